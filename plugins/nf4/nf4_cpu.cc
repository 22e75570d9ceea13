// Dequantizing and few-row products on the CPU.
#include <algorithm>
#include <atomic>
#include <vector>

#include "nf4.h"
#include "nf4_math.h"

namespace quantmill::nf4 {
namespace {

// Rows of the weight a thread takes at once: enough to hide the cost of a task, few enough to
// balance two threads on a small layer.
constexpr int64_t kRowGrain = 32;
// Bytes of codes a thread dequantizes at once; a multiple of every block.
constexpr int64_t kGrainWeights = 16 * kLargestBlock;
// Rows of x that the fused products take at once.
constexpr int kFusedRows = 4;

std::atomic<int> g_level_limit{static_cast<int>(CpuLevel::kAvx512)};

CpuLevel Level() {
  static const CpuLevel detected = DetectCpuLevel();
  return std::min(detected, static_cast<CpuLevel>(g_level_limit.load()));
}

float Convert(float value, float) { return value; }
qm::F16 Convert(float value, qm::F16) { return qm::ToF16(value); }
qm::BF16 Convert(float value, qm::BF16) { return qm::ToBF16(value); }

// Weights [begin, end) of the flat order; begin is even. The 16 values a block can take are
// computed once and looked up.
template <class T>
void DequantizeRange(const Weight& w, int64_t begin, int64_t end, T* out) {
  const int64_t size = w.params.block_size;
  T table[kCodebookSize];
  for (int64_t i = begin; i < end;) {
    const int64_t block = i / size, stop = std::min(end, (block + 1) * size);
    const float absmax = w.AbsmaxOf(block);
    for (int c = 0; c < kCodebookSize; ++c) table[c] = Convert(w.codebook[c] * absmax, T{});
    for (; i + 2 <= stop; i += 2) {
      const uint8_t byte = w.codes[i / 2];
      *out++ = table[byte >> 4];
      *out++ = table[byte & 15];
    }
    if (i < stop) {
      *out++ = table[w.codes[i / 2] >> 4];
      ++i;
    }
  }
}

template <class T>
qm_status DequantizeTo(qm_call* call, const Weight& w, T* out) {
  const int64_t n = w.weights(), pieces = (n + kGrainWeights - 1) / kGrainWeights;
  return qm::ParallelFor(call, pieces, 1, [&](int64_t first, int64_t last, int32_t) {
    const int64_t begin = first * kGrainWeights, end = std::min(n, last * kGrainWeights);
    DequantizeRange(w, begin, end, out + begin);
    return QM_OK;
  });
}

float Dot(const float* a, const float* b, int64_t n) {
  // Sixteen sums in a fixed order let the compiler use vectors without reordering.
  float sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int l = 0; l < 16; ++l) sums[l] += a[i + l] * b[i + l];
  }
  for (; i < n; ++i) sums[i % 16] += a[i] * b[i];
  float sum = 0.0f;
  for (const float part : sums) sum += part;
  return sum;
}

// Unpacks each row and multiplies: any shape, any machine.
qm_status MatmulByRows(qm_call* call, const Weight& w, const float* x, int64_t m, float* y) {
  return qm::ParallelFor(call, w.out, kRowGrain, [&](int64_t begin, int64_t end, int32_t) {
    std::vector<float> row(static_cast<size_t>(w.in) + 1);
    for (int64_t o = begin; o < end; ++o) {
      // A row may begin in the low half of a byte.
      const int64_t first = o * w.in, before = first % 2;
      DequantizeRange(w, first - before, first + w.in, row.data() + (1 - before));
      for (int64_t r = 0; r < m; ++r) y[r * w.out + o] = Dot(row.data() + 1, x + r * w.in, w.in);
    }
    return QM_OK;
  });
}

// x[chunk of 32][even, odd][lane] with `lanes` bytes at a time; see FusedInput.
void Rearrange(const float* x, int64_t in, int lanes, float* out) {
  for (int64_t chunk = 0; chunk < in; chunk += int64_t{2} * lanes) {
    for (int half = 0; half < 2; ++half) {
      for (int l = 0; l < lanes; ++l) *out++ = x[chunk + int64_t{2} * l + half];
    }
  }
}

qm_status MatmulFused(qm_call* call, const Weight& w, CpuLevel level, const float* x, int64_t m,
                      float* y) {
  const bool wide = level == CpuLevel::kAvx512;
  float* rearranged;
  QM_TRY(qm::Scratch(call, kHost, m * w.in, "rearranged activations", &rearranged));
  for (int64_t r = 0; r < m; ++r) {
    Rearrange(x + r * w.in, w.in, wide ? 16 : 8, rearranged + r * w.in);
  }
  return qm::ParallelFor(call, w.out, kRowGrain, [&](int64_t begin, int64_t end, int32_t) {
    for (int64_t r = 0; r < m; r += kFusedRows) {
      const FusedInput input = {&w, rearranged + r * w.in, w.in};
      const int rows = static_cast<int>(std::min<int64_t>(kFusedRows, m - r));
      const auto multiply = wide ? FusedRowsAvx512 : FusedRowsAvx2;
      multiply(input, rows, begin, end, y + r * w.out, w.out);
    }
    return QM_OK;
  });
}

}  // namespace

CpuLevel DetectCpuLevel() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return CpuLevel::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuLevel::kAvx2;
#endif
  return CpuLevel::kPortable;
}

void LimitCpuLevel(CpuLevel limit) { g_level_limit = static_cast<int>(limit); }

qm_status CpuDequantize(qm_call* call, const Weight& w, qm_tensor* out) {
  switch (out->dtype) {
    case QM_F32:
      return DequantizeTo(call, w, static_cast<float*>(out->data));
    case QM_F16:
      return DequantizeTo(call, w, static_cast<qm::F16*>(out->data));
    default:
      return DequantizeTo(call, w, static_cast<qm::BF16*>(out->data));
  }
}

qm_status CpuMatmul(qm_call* call, const Weight& w, const qm_tensor& x, qm_tensor* y) {
  const int64_t m = x.shape[0];
  if (x.dtype != QM_F32 || m > kCpuMaxRows) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "on the CPU products with packed weights are served ",
                    "for up to ", kCpuMaxRows, " f32 rows");
  }
  const float* input = static_cast<const float*>(x.data);
  float* output = static_cast<float*>(y->data);
  const CpuLevel level = Level();
  // Chunks of 32 weights then begin at a byte and lie within one block.
  const bool fused = level != CpuLevel::kPortable && w.in % 32 == 0;
  return fused ? MatmulFused(call, w, level, input, m, output)
               : MatmulByRows(call, w, input, m, output);
}

}  // namespace quantmill::nf4
