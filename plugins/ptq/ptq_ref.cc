// Round to nearest on the CPU: the reference of ptq.cu.
//
//   for every row, for every group: range -> scale (rounded to the stored type), zero
//   code = clamp(round(w / scale) + zero, 0, 2^bits - 1), 32 codes at a time into `bits` words
//
// Rows are independent; the loops inside run over 32 channels and vectorise.
#include <algorithm>
#include <atomic>
#include <limits>

#include "ptq.h"

namespace quantmill::ptq {
namespace {

// 32 codes fill exactly `bits` words.
constexpr int64_t kSegment = 32;
constexpr int64_t kRowsPerTask = 8;

inline void EncodeRow(const float* w, const Options& options, int64_t row,
                      const qm::AffineTensors& out) {
  const qm::AffineShape& shape = options.shape;
  const qm::AffineRule& rule = shape.rule;
  const int64_t width = shape.group_width(), groups = shape.groups();
  uint8_t* zeros = static_cast<uint8_t*>(out.zero.data);
  for (int64_t g = 0; g < groups; ++g) {
    const qm::AffineGroup group = qm::FindAffineGroup(w + g * width, width, rule, options.search);
    qm::StoreScale(out.scale.data, rule.scale_dtype, row * groups + g, group.scale);
    if (zeros != nullptr) zeros[row * groups + g] = static_cast<uint8_t>(group.zero);
  }
  const float max_code = rule.max_code();
  const int64_t words = qm::AffineWordsPerRow(shape.in_features, rule.bits);
  int32_t* packed = static_cast<int32_t*>(out.codes.data) + row * words;
  uint8_t codes[kSegment];
  for (int64_t begin = 0; begin < shape.in_features; begin += kSegment) {
    const int64_t end = std::min(begin + kSegment, shape.in_features);
    for (int64_t i = begin; i < end;) {
      const int64_t g = i / width;
      const int64_t group_end = std::min(end, (g + 1) * width);
      const qm::AffineGroup group = {
          qm::LoadScale(out.scale.data, rule.scale_dtype, row * groups + g),
          zeros != nullptr ? static_cast<float>(zeros[row * groups + g])
                           : 0.5f * (max_code + 1.0f)};
      for (; i < group_end; ++i) {
        codes[i - begin] = static_cast<uint8_t>(qm::EncodeAffine(w[i], group, max_code));
      }
    }
    const int64_t first_word = begin / kSegment * rule.bits;
    const int64_t count = qm::AffineWordsPerRow(end - begin, rule.bits);
    for (int64_t k = 0; k < count; ++k) {
      packed[first_word + k] = static_cast<int32_t>(qm::PackWord(codes, end - begin, rule.bits, k));
    }
  }
}

#if defined(__x86_64__)
__attribute__((target("avx2"), flatten)) void EncodeRowAvx2(const float* w, const Options& options,
                                                            int64_t row,
                                                            const qm::AffineTensors& out) {
  EncodeRow(w, options, row, out);
}
#endif

using EncodeRowFn = void (*)(const float*, const Options&, int64_t, const qm::AffineTensors&);

EncodeRowFn ChooseEncodeRow() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return EncodeRowAvx2;
#endif
  return EncodeRow;
}

}  // namespace

qm_status QuantizeCpu(qm_call* call, const Options& options, qm::TensorView<const float> weight,
                      const qm::AffineTensors& out) {
  const int64_t rows = options.shape.out_features, cols = options.shape.in_features;
  const EncodeRowFn encode_row = ChooseEncodeRow();
  // Index of the first bad weight, so that the message does not depend on the threads.
  std::atomic<int64_t> bad{std::numeric_limits<int64_t>::max()};
  std::atomic<int64_t> done{0};
  QM_TRY(qm::ParallelFor(call, rows, kRowsPerTask, [&](int64_t begin, int64_t end, int32_t) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t column = qm::FirstNotFinite(weight.row(row), cols);
      if (column >= 0) {
        const int64_t index = row * cols + column;
        int64_t seen = bad.load();
        while (index < seen && !bad.compare_exchange_weak(seen, index)) {
        }
        continue;
      }
      encode_row(weight.row(row), options, row, out);
    }
    const int64_t finished = done += end - begin;
    return qm::Progress(call, static_cast<double>(finished) / static_cast<double>(rows));
  }));
  if (bad != std::numeric_limits<int64_t>::max()) return NotFinite(call, bad / cols, bad % cols);
  return QM_OK;
}

}  // namespace quantmill::ptq
