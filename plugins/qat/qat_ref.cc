// Quantization-aware training on the CPU: the reference of qat.cu and qat_init.cu.
//
// Rows and groups are independent. Groups follow one another in memory, so most loops are over
// them and not over rows; inside, loops run over 16 weights side by side and vectorise.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "qat.h"
#include "quantmill/sdk/affine_search.hpp"

namespace quantmill::qat {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kRowsPerTask = 8;
// Weights of a task of forward and vjp, about.
constexpr int64_t kWeightsPerTask = 32768;
// 32 codes fill exactly `bits` words.
constexpr int64_t kSegment = 32;

// The least index seen, so that a message does not depend on the threads.
class LeastIndex {
 public:
  void Note(int64_t index) {
    int64_t seen = index_.load();
    while (index < seen && !index_.compare_exchange_weak(seen, index)) {
    }
  }
  bool any() const { return index_.load() != std::numeric_limits<int64_t>::max(); }
  int64_t value() const { return index_.load(); }

 private:
  std::atomic<int64_t> index_{std::numeric_limits<int64_t>::max()};
};

// Everything one range of groups needs.
struct Task {
  const qm::AffineShape& shape;
  const float* weight;
  const Parameters& params;
};

inline void Store(float value, float* out) { *out = value; }
inline void Store(float value, qm::F16* out) { *out = qm::ToF16(value); }
inline void Store(float value, qm::BF16* out) { *out = qm::ToBF16(value); }

template <class Out>
inline void ForwardGroup(const Task& task, int64_t index, Out* out) {
  const int64_t width = task.shape.group_width();
  const qm::AffineGroup grid = GridOf(task.params, task.shape.rule, index);
  const float max_code = task.shape.rule.max_code();
  const float* __restrict__ w = task.weight + index * width;
  Out* __restrict__ y = out + index * width;
  for (int64_t i = 0; i < width; ++i) Store(FakeQuantize(w[i], grid, max_code), y + i);
}

// Sums: 16 lanes in ascending order, then joined pairwise.
inline void VjpGroup(const Task& task, int64_t index, const float* d_out, const Gradients& out) {
  const int64_t width = task.shape.group_width();
  const qm::AffineGroup grid = GridOf(task.params, task.shape.rule, index);
  const float max_code = task.shape.rule.max_code();
  const float* __restrict__ w = task.weight + index * width;
  const float* __restrict__ g = d_out + index * width;
  float scale[kLanes] = {}, clipped[kLanes] = {}, unwanted[kLanes] = {};
  const auto run = [&](int64_t i, int lanes, float* __restrict__ d_weight) {
    for (int l = 0; l < lanes; ++l) {
      const Derivative d = Differentiate(w[i + l], g[i + l], grid, max_code);
      scale[l] += d.scale;
      clipped[l] += d.clipped;
      d_weight[l] += d.weight;
    }
  };
  float* d_weight = out.weight == nullptr ? nullptr : out.weight + index * width;
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    run(i, kLanes, d_weight == nullptr ? unwanted : d_weight + i);
  }
  run(i, static_cast<int>(width - i), d_weight == nullptr ? unwanted : d_weight + i);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) {
      scale[l] += scale[l + half];
      clipped[l] += clipped[l + half];
    }
  }
  if (out.factor != nullptr) out.factor[index] += task.params.scale_init[index] * scale[0];
  if (out.zero != nullptr) out.zero[index] -= grid.scale * clipped[0];
}

template <class Out>
inline void ForwardGroups(const Task& task, int64_t begin, int64_t end, Out* out) {
  for (int64_t index = begin; index < end; ++index) ForwardGroup(task, index, out);
}

inline void VjpGroups(const Task& task, int64_t begin, int64_t end, const float* d_out,
                      const Gradients& out) {
  for (int64_t index = begin; index < end; ++index) VjpGroup(task, index, d_out, out);
}

// Codes of one row into its words.
inline void EncodeRow(const float* w, const qm::AffineShape& shape, int64_t row,
                      const Parameters& params, const qm::AffineTensors& out) {
  const qm::AffineRule& rule = shape.rule;
  const int64_t width = shape.group_width(), groups = shape.groups();
  const int64_t words = qm::AffineWordsPerRow(shape.in_features, rule.bits);
  int32_t* packed = static_cast<int32_t*>(out.codes.data) + row * words;
  uint8_t codes[kSegment];
  for (int64_t begin = 0; begin < shape.in_features; begin += kSegment) {
    const int64_t end = std::min(begin + kSegment, shape.in_features);
    for (int64_t i = begin; i < end;) {
      const int64_t g = i / width;
      const int64_t group_end = std::min(end, (g + 1) * width);
      const qm::AffineGroup grid = GridOf(params, rule, row * groups + g);
      for (; i < group_end; ++i) {
        codes[i - begin] = static_cast<uint8_t>(qm::EncodeAffine(w[i], grid, rule.max_code()));
      }
    }
    const int64_t first_word = begin / kSegment * rule.bits;
    const int64_t count = qm::AffineWordsPerRow(end - begin, rule.bits);
    for (int64_t k = 0; k < count; ++k) {
      packed[first_word + k] = static_cast<int32_t>(qm::PackWord(codes, end - begin, rule.bits, k));
    }
  }
}

inline void SearchRow(const float* w, const qm::AffineShape& shape, int64_t row,
                      const FreshParameters& out) {
  const int64_t width = shape.group_width(), groups = shape.groups();
  const qm::AffineSearch search = {qm::AffineClip::kSquaredError};
  for (int64_t g = 0; g < groups; ++g) {
    const qm::AffineGroup group = qm::FindAffineGroup(w + g * width, width, shape.rule, search);
    const int64_t index = row * groups + g;
    out.factor[index] = 1.0f;
    out.scale_init[index] = group.scale;
    if (out.zero != nullptr) out.zero[index] = group.zero;
  }
}

#if defined(__x86_64__)
#define QM_QAT_AVX2 __attribute__((target("avx2"), flatten))
template <class Out>
QM_QAT_AVX2 void ForwardGroupsAvx2(const Task& task, int64_t begin, int64_t end, Out* out) {
  ForwardGroups(task, begin, end, out);
}
QM_QAT_AVX2 void VjpGroupsAvx2(const Task& task, int64_t begin, int64_t end, const float* d_out,
                               const Gradients& out) {
  VjpGroups(task, begin, end, d_out, out);
}
QM_QAT_AVX2 void SearchRowAvx2(const float* w, const qm::AffineShape& shape, int64_t row,
                               const FreshParameters& out) {
  SearchRow(w, shape, row, out);
}
bool HaveAvx2() { return __builtin_cpu_supports("avx2"); }
#endif

template <class Out>
void RunForward(const Task& task, int64_t begin, int64_t end, Out* out) {
#if defined(__x86_64__)
  if (HaveAvx2()) return ForwardGroupsAvx2(task, begin, end, out);
#endif
  ForwardGroups(task, begin, end, out);
}

void RunVjp(const Task& task, int64_t begin, int64_t end, const float* d_out,
            const Gradients& out) {
#if defined(__x86_64__)
  if (HaveAvx2()) return VjpGroupsAvx2(task, begin, end, d_out, out);
#endif
  VjpGroups(task, begin, end, d_out, out);
}

void RunSearch(const float* w, const qm::AffineShape& shape, int64_t row,
               const FreshParameters& out) {
#if defined(__x86_64__)
  if (HaveAvx2()) return SearchRowAvx2(w, shape, row, out);
#endif
  SearchRow(w, shape, row, out);
}

// body(begin, end) over all groups.
template <class Body>
qm_status ForGroups(qm_call* call, const qm::AffineShape& shape, Body&& body) {
  const int64_t grain = std::max<int64_t>(1, kWeightsPerTask / shape.group_width());
  return qm::ParallelFor(call, shape.out_features * shape.groups(), grain,
                         [&](int64_t begin, int64_t end, int32_t) {
                           body(begin, end);
                           return QM_OK;
                         });
}

// body(row) over rows whose weights are finite; *bad notes the first that is not.
template <class Body>
qm_status ForFiniteRows(qm_call* call, const qm::AffineShape& shape,
                        qm::TensorView<const float> weight, LeastIndex* bad, Body&& body) {
  const int64_t rows = shape.out_features, cols = shape.in_features;
  std::atomic<int64_t> done{0};
  return qm::ParallelFor(call, rows, kRowsPerTask, [&](int64_t begin, int64_t end, int32_t) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t column = qm::FirstNotFinite(weight.row(row), cols);
      if (column >= 0) {
        bad->Note(row * cols + column);
      } else {
        body(row);
      }
    }
    const int64_t finished = done += end - begin;
    return qm::Progress(call, static_cast<double>(finished) / static_cast<double>(rows));
  });
}

// The grid of a group of the base, and whether it can be used.
bool ReadGrid(const qm::AffineShape& shape, const Base& base, int64_t index, qm::AffineGroup* out) {
  const float max_code = shape.rule.max_code();
  const float scale = qm::LoadScale(base.scale, base.scale_dtype, index);
  float zero = 0.5f * (max_code + 1.0f);
  if (base.zero != nullptr) {
    zero = base.zero_dtype == QM_U8
               ? static_cast<float>(static_cast<const uint8_t*>(base.zero)[index])
               : qm::LoadScale(base.zero, base.zero_dtype, index);
  }
  if (!(scale > 0.0f && std::isfinite(scale) && std::isfinite(zero))) return false;
  zero = std::clamp(zero, 0.0f, max_code);
  *out = {qm::RoundScale(scale, shape.rule.scale_dtype), qm::RoundHalfEven(zero)};
  return true;
}

}  // namespace

qm_status InitFromWeightCpu(qm_call* call, const qm::AffineShape& shape,
                            qm::TensorView<const float> weight, const FreshParameters& out) {
  LeastIndex bad;
  QM_TRY(ForFiniteRows(call, shape, weight, &bad,
                       [&](int64_t row) { RunSearch(weight.row(row), shape, row, out); }));
  if (!bad.any()) return QM_OK;
  return qm::NotFinite(call, bad.value() / shape.in_features, bad.value() % shape.in_features);
}

qm_status InitFromBaseCpu(qm_call* call, const qm::AffineShape& shape,
                          qm::TensorView<const float> weight, const Base& base,
                          const FreshParameters& out, float* start) {
  const qm::AffineRule& rule = shape.rule;
  const int64_t width = shape.group_width(), groups = shape.groups();
  const int64_t words = qm::AffineWordsPerRow(shape.in_features, rule.bits);
  LeastIndex bad, damaged;
  QM_TRY(ForFiniteRows(call, shape, weight, &bad, [&](int64_t row) {
    const float* w = weight.row(row);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t index = row * groups + g;
      qm::AffineGroup grid = {};
      if (!ReadGrid(shape, base, index, &grid)) {
        damaged.Note(index);
        continue;
      }
      out.factor[index] = 1.0f;
      out.scale_init[index] = grid.scale;
      if (out.zero != nullptr) out.zero[index] = grid.zero;
      if (start == nullptr) continue;
      for (int64_t i = g * width; i < (g + 1) * width; ++i) {
        const uint32_t code = qm::UnpackCode(base.codes + row * words, rule.bits, i);
        start[row * shape.in_features + i] = InsideCell(w[i], static_cast<float>(code), grid);
      }
    }
  }));
  if (damaged.any()) return DamagedBase(call, shape, damaged.value());
  if (!bad.any()) return QM_OK;
  return qm::NotFinite(call, bad.value() / shape.in_features, bad.value() % shape.in_features);
}

qm_status ForwardCpu(qm_call* call, const qm::AffineShape& shape, const float* weight,
                     const Parameters& params, qm_dtype out_dtype, void* out) {
  const Task task = {shape, weight, params};
  return ForGroups(call, shape, [&](int64_t begin, int64_t end) {
    if (out_dtype == QM_F16) {
      RunForward(task, begin, end, static_cast<qm::F16*>(out));
    } else if (out_dtype == QM_BF16) {
      RunForward(task, begin, end, static_cast<qm::BF16*>(out));
    } else {
      RunForward(task, begin, end, static_cast<float*>(out));
    }
  });
}

qm_status VjpCpu(qm_call* call, const qm::AffineShape& shape, const float* weight,
                 const Parameters& params, const float* d_out, const Gradients& out) {
  const Task task = {shape, weight, params};
  return ForGroups(call, shape,
                   [&](int64_t begin, int64_t end) { RunVjp(task, begin, end, d_out, out); });
}

qm_status FinalizeCpu(qm_call* call, const qm::AffineShape& shape,
                      qm::TensorView<const float> weight, const Parameters& params,
                      const qm::AffineTensors& out) {
  const int64_t groups = shape.groups();
  uint8_t* zeros = static_cast<uint8_t*>(out.zero.data);
  LeastIndex bad, bad_group;
  QM_TRY(ForFiniteRows(call, shape, weight, &bad, [&](int64_t row) {
    for (int64_t index = row * groups; index < (row + 1) * groups; ++index) {
      if (!std::isfinite(params.factor[index]) || !std::isfinite(params.scale_init[index]) ||
          (params.zero != nullptr && !std::isfinite(params.zero[index]))) {
        bad_group.Note(index);
      }
      const qm::AffineGroup grid = GridOf(params, shape.rule, index);
      qm::StoreScale(out.scale.data, shape.rule.scale_dtype, index, grid.scale);
      if (zeros != nullptr) zeros[index] = static_cast<uint8_t>(grid.zero);
    }
    EncodeRow(weight.row(row), shape, row, params, out);
  }));
  if (bad.any()) {
    return Diverged(call, "weight", bad.value() / shape.in_features,
                    bad.value() % shape.in_features);
  }
  if (!bad_group.any()) return QM_OK;
  return Diverged(call, "scale or zero point", bad_group.value() / groups,
                  bad_group.value() % groups);
}

}  // namespace quantmill::qat
