// FindAffineGroup of affine_search.hpp on one warp, bit for bit (compile with --fmad=false).
//
//   lane l holds elements l, l + 32, l + 64, ...; sums and extremes are taken per lane in ascending
//   order and joined by a butterfly, which adds the same pairs as JoinLanes.
#ifndef QUANTMILL_SDK_AFFINE_SEARCH_CUH_
#define QUANTMILL_SDK_AFFINE_SEARCH_CUH_

#include "quantmill/sdk/affine_search.hpp"

namespace qm {

// One group of n weights as a warp sees it, with the importance of each or null. kCached > 0 keeps
// the weights in registers (n <= 32 kCached); 0 reads them again on every pass.
template <int kCached>
class WarpGroup {
 public:
  // One group of n values, read by all lanes.
  __device__ WarpGroup(const float* w, int64_t n, const float* importance = nullptr)
      : w_(w), importance_(importance), n_(n), lane_(threadIdx.x % 32) {
    if constexpr (kCached > 0) {
#pragma unroll
      for (int j = 0; j < kCached; ++j) {
        const int i = lane_ + 32 * j;
        cache_[j] = i < n_ ? w_[i] : 0.0f;
      }
    }
  }

  // f(value, index) for the lane's elements, ascending.
  template <class F>
  __device__ void ForEachIndexed(F&& f) const {
    if constexpr (kCached > 0) {
#pragma unroll
      for (int j = 0; j < kCached; ++j) {
        const int i = lane_ + 32 * j;
        if (i < n_) f(cache_[j], i);
      }
    } else {
      for (int64_t i = lane_; i < n_; i += 32) f(w_[i], i);
    }
  }
  // f(value) for the lane's elements, ascending.
  template <class F>
  __device__ void ForEach(F&& f) const {
    ForEachIndexed([&](float x, int64_t) { f(x); });
  }
  // Values of the group.
  __device__ int64_t size() const { return n_; }
  // Weight of each value's error, or null.
  __device__ const float* importance() const { return importance_; }

 private:
  const float* w_;
  const float* importance_;
  int64_t n_;
  int lane_;
  float cache_[kCached > 0 ? kCached : 1];
};

namespace internal {

inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

template <int kCached>
__device__ float WarpAffineError(const WarpGroup<kCached>& values, AffineGroup group,
                                 float max_code) {
  float sum = 0.0f;
  const float* importance = values.importance();
  values.ForEachIndexed([&](float x, int64_t i) {
    const float d = DecodeAffine(EncodeAffine(x, group, max_code), group) - x;
    sum += importance != nullptr ? importance[i] * (d * d) : d * d;
  });
  for (int half = 16; half > 0; half /= 2) sum += __shfl_xor_sync(kAllLanes, sum, half);
  return sum;
}

template <int kCached>
__device__ void WarpExtremes(const WarpGroup<kCached>& values, float* low, float* high) {
  float lo = 0.0f, hi = 0.0f;
  values.ForEach([&](float x) {
    lo = x < lo ? x : lo;
    hi = x > hi ? x : hi;
  });
  for (int half = 16; half > 0; half /= 2) {
    const float other_lo = __shfl_xor_sync(kAllLanes, lo, half);
    const float other_hi = __shfl_xor_sync(kAllLanes, hi, half);
    lo = other_lo < lo ? other_lo : lo;
    hi = other_hi > hi ? other_hi : hi;
  }
  *low = lo;
  *high = hi;
}

template <int kCached>
__device__ float WarpSelectRank(const WarpGroup<kCached>& values, int64_t rank, bool magnitude) {
  const uint32_t mask = magnitude ? 0x7FFFFFFFu : 0xFFFFFFFFu;
  uint32_t prefix = 0;
  for (int bit = 31; bit >= 0; --bit) {
    uint32_t zeros = 0;
    values.ForEach([&](float x) {
      const uint32_t key = OrderedKey(FloatFromBits(FloatBits(x) & mask));
      zeros += (key >> bit) == (prefix >> bit) ? 1u : 0u;
    });
    for (int half = 16; half > 0; half /= 2) zeros += __shfl_xor_sync(kAllLanes, zeros, half);
    if (rank >= zeros) {
      rank -= zeros;
      prefix |= 1u << bit;
    }
  }
  return FromOrderedKey(prefix);
}

template <int kCached>
__device__ float WarpQuantile(const WarpGroup<kCached>& values, double quantile, bool magnitude) {
  const QuantilePosition at = PositionOfQuantile(quantile, values.size());
  const float below = WarpSelectRank(values, at.index, magnitude);
  if (at.fraction == 0.0f) return below;
  const float above = WarpSelectRank(values, at.index + 1, magnitude);
  return below + at.fraction * (above - below);
}

}  // namespace internal

// All 32 lanes call it and get the same result.
template <int kCached>
__device__ AffineGroup WarpFindAffineGroup(const WarpGroup<kCached>& values, const AffineRule& rule,
                                           const AffineSearch& search) {
  float low = 0.0f, high = 0.0f;
  if (search.clip == AffineClip::kPercentile) {
    if (rule.symmetric) {
      high = internal::WarpQuantile(values, search.percentile, true);
    } else {
      low = internal::WarpQuantile(values, 1.0 - search.percentile, false);
      high = internal::WarpQuantile(values, search.percentile, false);
    }
  } else {
    internal::WarpExtremes(values, &low, &high);
  }
  WidenRange(rule.symmetric, &low, &high);
  AffineGroup best = GroupForRange(low, high, rule);
  if (search.clip != AffineClip::kSquaredError) return best;
  const float max_code = rule.max_code();
  float best_error = internal::WarpAffineError(values, best, max_code);
  for (int step = 1; step < kShrinkSteps; ++step) {
    const float p = ShrinkFactor(step);
    const AffineGroup group = GroupForRange(p * low, p * high, rule);
    const float error = internal::WarpAffineError(values, group, max_code);
    if (error < best_error) {
      best_error = error;
      best = group;
    }
  }
  return best;
}

}  // namespace qm

#endif  // QUANTMILL_SDK_AFFINE_SEARCH_CUH_
