#include "core/cpu/scoring.h"

#include <algorithm>
#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/cpu/scoring.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Must come after foreach_target.h.
#include "core/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quantmill::cpu {
namespace HWY_NAMESPACE {

// Elements summed in f32 lanes before the sum moves on to f64: 64 additions per lane with the
// longest vectors and 256 with the shortest, so the rounding error stays near that of the
// exponentials themselves.
constexpr int64_t kChunk = 1024;
constexpr int64_t kMaxLanes = HWY_MAX_BYTES / sizeof(float);

// A vector at row[i], with `fill` beyond the end of the row.
HWY_INLINE VecF32 LoadOr(F32 d, const float* row, int64_t i, int64_t n, float fill) {
  if (i + F32Lanes() <= n) return hn::LoadU(d, row + i);
  HWY_ALIGN float values[kMaxLanes];
  for (int64_t lane = 0; lane < kMaxLanes; ++lane)
    values[lane] = i + lane < n ? row[i + lane] : fill;
  return hn::Load(d, values);
}

float LargestOf(const float* row, int64_t n) {
  const F32 d;
  const float lowest = -std::numeric_limits<float>::infinity();
  VecF32 largest = hn::Set(d, lowest);
  for (int64_t i = 0; i < n; i += F32Lanes()) {
    largest = hn::Max(largest, LoadOr(d, row, i, n, lowest));
  }
  return Maximum(d, largest);
}

// First index whose value equals `value`; 0 if there is none (NaN in the row).
int64_t FirstEqual(const float* row, int64_t n, float value) {
  const F32 d;
  const VecF32 wanted = hn::Set(d, value);
  const int64_t lanes = F32Lanes();
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto equal = hn::Eq(hn::LoadU(d, row + i), wanted);
    if (!hn::AllFalse(d, equal)) return i + hn::FindFirstTrue(d, equal);
  }
  for (; i < n; ++i) {
    if (row[i] == value) return i;
  }
  return 0;
}

// sum of e^(row[i] - shift).
double SumOfExp(const float* row, int64_t n, float shift) {
  const F32 d;
  const VecF32 shifts = hn::Set(d, shift);
  double total = 0;
  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    const int64_t end = std::min(n, chunk + kChunk);
    VecF32 sum = hn::Zero(d);
    for (int64_t i = chunk; i < end; i += F32Lanes()) {
      const VecF32 value = LoadOr(d, row, i, n, -std::numeric_limits<float>::infinity());
      sum = hn::Add(sum, ExpKeepNaN(d, hn::Sub(value, shifts)));
    }
    total += Sum(d, sum);
  }
  return total;
}

void ScoreRow(const float* row, int64_t n, int32_t target, float* nll, int32_t* argmax) {
  const float largest = LargestOf(row, n);
  *argmax = static_cast<int32_t>(FirstEqual(row, n, largest));
  const double log_sum = std::log(SumOfExp(row, n, largest));
  *nll = static_cast<float>(log_sum + (static_cast<double>(largest) - row[target]));
}

// e^x - 1 - x for |x| < 1/2: the Taylor series up to x^8 / 8!, relative error below 1e-7.
HWY_INLINE VecF32 ExpMinusLine(F32 d, VecF32 x) {
  VecF32 series = hn::Set(d, 1.0f / 40320);
  for (float coefficient : {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f}) {
    series = hn::MulAdd(series, x, hn::Set(d, coefficient));
  }
  return hn::Mul(hn::Mul(x, x), series);
}

// With r = log q - log p the divergence is sum_v p (e^r - 1 - r), as p and q sum to 1. No term is
// negative, so nothing cancels, and an error e in a log sum changes the result by e^2 / 2 only.
// Where |r| is not small the term is taken as q - p - p r, which needs no e^r that might overflow.
float KlRow(const float* p, const float* q, int64_t n) {
  const F32 d;
  const float lowest = -std::numeric_limits<float>::infinity();
  const float p_largest = LargestOf(p, n), q_largest = LargestOf(q, n);
  const double p_log_sum = std::log(SumOfExp(p, n, p_largest));
  const double q_log_sum = std::log(SumOfExp(q, n, q_largest));
  // Subtracting the largest logit first keeps every later rounding small.
  const VecF32 p_top = hn::Set(d, p_largest), q_top = hn::Set(d, q_largest);
  const VecF32 p_shift = hn::Set(d, static_cast<float>(p_log_sum));
  const VecF32 q_shift = hn::Set(d, static_cast<float>(q_log_sum));
  const VecF32 ratio_shift = hn::Set(d, static_cast<float>(q_log_sum - p_log_sum));
  double divergence = 0;
  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    const int64_t end = std::min(n, chunk + kChunk);
    VecF32 sum = hn::Zero(d);
    for (int64_t i = chunk; i < end; i += F32Lanes()) {
      const VecF32 p_logit = hn::Sub(LoadOr(d, p, i, n, lowest), p_top);
      const VecF32 q_logit = hn::Sub(LoadOr(d, q, i, n, lowest), q_top);
      const VecF32 p_value = ExpKeepNaN(d, hn::Sub(p_logit, p_shift));
      const VecF32 q_value = ExpKeepNaN(d, hn::Sub(q_logit, q_shift));
      const VecF32 ratio = hn::Sub(hn::Sub(q_logit, p_logit), ratio_shift);
      const VecF32 near = hn::Mul(p_value, ExpMinusLine(d, ratio));
      // p r is 0 for p = 0, also where r is infinite.
      const VecF32 line = hn::IfThenZeroElse(hn::Eq(p_value, hn::Zero(d)), hn::Mul(p_value, ratio));
      const VecF32 far = hn::Sub(hn::Sub(q_value, p_value), line);
      const auto is_near = hn::Lt(hn::Abs(ratio), hn::Set(d, 0.5f));
      sum = hn::Add(sum, hn::IfThenElse(is_near, near, far));
    }
    divergence += Sum(d, sum);
  }
  return static_cast<float>(divergence);
}

}  // namespace HWY_NAMESPACE
}  // namespace quantmill::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantmill::cpu {
namespace {

HWY_EXPORT(ScoreRow);
HWY_EXPORT(KlRow);

}  // namespace

void ScoreRows(ThreadPool& threads, const float* logits, int64_t rows, int64_t vocab,
               const int32_t* targets, float* nll, int32_t* argmax) {
  const auto kernel = HWY_DYNAMIC_DISPATCH(ScoreRow);
  threads.ParallelFor(rows, 1, [=](int64_t row, int64_t, int) {
    kernel(logits + row * vocab, vocab, targets[row], nll + row, argmax + row);
  });
}

void KlRows(ThreadPool& threads, const float* reference, const float* logits, int64_t rows,
            int64_t vocab, float* kl) {
  const auto kernel = HWY_DYNAMIC_DISPATCH(KlRow);
  threads.ParallelFor(rows, 1, [=](int64_t row, int64_t, int) {
    kl[row] = kernel(reference + row * vocab, logits + row * vocab, vocab);
  });
}

}  // namespace quantmill::cpu
#endif  // HWY_ONCE
