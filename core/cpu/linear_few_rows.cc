#include "core/cpu/linear_few_rows.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/cpu/linear_few_rows.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Must come after foreach_target.h.
#include "core/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quantmill::cpu {
namespace HWY_NAMESPACE {

// out[r, j] for kRows rows of x and kOuts rows of w. kSteps vectors of each row are in flight, so
// that kRows * kOuts * kSteps independent sums (8 where registers allow) hide the latency of the
// multiply-adds. The order of each sum depends on k alone.
template <int kRows, int kOuts, int kSteps, class Element>
HWY_INLINE void DotTile(const float* x, int64_t k, const Element* w, float* out, int64_t n) {
  const F32 d;
  const int64_t lanes = F32Lanes();
  VecF32 sum[kRows][kOuts][kSteps];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kOuts; ++j) {
      for (int s = 0; s < kSteps; ++s) sum[r][j][s] = hn::Zero(d);
    }
  }
  int64_t i = 0;
  for (; i + kSteps * lanes <= k; i += kSteps * lanes) {
    for (int s = 0; s < kSteps; ++s) {
      for (int j = 0; j < kOuts; ++j) {
        const VecF32 weight = LoadF32(d, w + j * k + i + s * lanes);
        for (int r = 0; r < kRows; ++r) {
          sum[r][j][s] = hn::MulAdd(weight, hn::LoadU(d, x + r * k + i + s * lanes), sum[r][j][s]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kOuts; ++j) {
      VecF32 total = sum[r][j][0];
      for (int s = 1; s < kSteps; ++s) total = hn::Add(total, sum[r][j][s]);
      float value = Sum(d, total);
      for (int64_t rest = i; rest < k; ++rest)
        value += x[r * k + rest] * ScalarF32(w[j * k + rest]);
      out[r * n + j] = value;
    }
  }
}

// Columns [begin, end) of the output. w: the whole weight.
template <int kRows, int kOuts, int kSteps, class Element>
void DotColumns(const float* x, int64_t k, const Element* w, int64_t n, int64_t begin, int64_t end,
                float* out) {
  int64_t j = begin;
  for (; j + kOuts <= end; j += kOuts) {
    DotTile<kRows, kOuts, kSteps>(x, k, w + j * k, out + j, n);
  }
  for (; j < end; ++j) DotTile<kRows, 1, kSteps>(x, k, w + j * k, out + j, n);
}

template <class Element>
void FewRows(const float* x, int64_t rows, int64_t k, const Element* w, int64_t n, int64_t begin,
             int64_t end, float* out) {
  switch (rows) {
    case 1:
      return DotColumns<1, 4, 2>(x, k, w, n, begin, end, out);
    case 2:
      return DotColumns<2, 2, 2>(x, k, w, n, begin, end, out);
    case 3:
      return DotColumns<3, 2, 1>(x, k, w, n, begin, end, out);
    case 4:
      return DotColumns<4, 2, 1>(x, k, w, n, begin, end, out);
    case 5:
      return DotColumns<5, 1, 1>(x, k, w, n, begin, end, out);
    case 6:
      return DotColumns<6, 1, 1>(x, k, w, n, begin, end, out);
    case 7:
      return DotColumns<7, 1, 1>(x, k, w, n, begin, end, out);
    default:
      return DotColumns<8, 1, 1>(x, k, w, n, begin, end, out);
  }
}

void FewRowsF32(const float* x, int64_t rows, int64_t k, const void* w, int64_t n, int64_t begin,
                int64_t end, float* out) {
  FewRows(x, rows, k, static_cast<const float*>(w), n, begin, end, out);
}
void FewRowsBF16(const float* x, int64_t rows, int64_t k, const void* w, int64_t n, int64_t begin,
                 int64_t end, float* out) {
  FewRows(x, rows, k, static_cast<const BF16Element*>(w), n, begin, end, out);
}
void FewRowsF16(const float* x, int64_t rows, int64_t k, const void* w, int64_t n, int64_t begin,
                int64_t end, float* out) {
  FewRows(x, rows, k, static_cast<const F16Element*>(w), n, begin, end, out);
}

}  // namespace HWY_NAMESPACE
}  // namespace quantmill::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantmill::cpu {

HWY_EXPORT(FewRowsF32);
HWY_EXPORT(FewRowsBF16);
HWY_EXPORT(FewRowsF16);

void LinearFewRows(ThreadPool& threads, const float* x, int64_t rows, int64_t k, const void* weight,
                   DType weight_dtype, int64_t n, const float* bias, float* out) {
  const auto kernel = weight_dtype == DType::kF32    ? HWY_DYNAMIC_DISPATCH(FewRowsF32)
                      : weight_dtype == DType::kBF16 ? HWY_DYNAMIC_DISPATCH(FewRowsBF16)
                                                     : HWY_DYNAMIC_DISPATCH(FewRowsF16);
  // Ranges of about 64 Ki weights, whole tiles of four output columns: long against the cost of
  // handing out a range, short enough to share even small layers among threads.
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, k) / 4) * 4;
  threads.ParallelFor(n, grain, [&](int64_t begin, int64_t end, int) {
    kernel(x, rows, k, weight, n, begin, end, out);
    if (bias == nullptr) return;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = begin; j < end; ++j) out[row * n + j] += bias[j];
    }
  });
}

}  // namespace quantmill::cpu
#endif  // HWY_ONCE
