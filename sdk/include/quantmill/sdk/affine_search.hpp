// Which range of values a group of weights is quantized over: its extremes, the range with the
// least squared error, or a quantile. Host code; affine_search.cuh does the same on a warp, with
// the same bits: every sum runs over 32 lanes (element i in lane i % 32, ascending) joined
// pairwise.
#ifndef QUANTMILL_SDK_AFFINE_SEARCH_HPP_
#define QUANTMILL_SDK_AFFINE_SEARCH_HPP_

#include <cstdint>

#include "quantmill/sdk/affine_int.hpp"

namespace qm {

// Where a range ends.
enum class AffineClip : int32_t { kNone = 0, kSquaredError = 1, kPercentile = 2 };

// How a range is found.
struct AffineSearch {
  AffineClip clip = AffineClip::kNone;  // where the range ends
  double percentile = 0.999;  // kPercentile: the part of |w| (or of each side) that is kept
};

// Lanes of every sum over a group.
inline constexpr int kAffineLanes = 32;
// The published search: the range times 1, 0.99, ..., 0.21 (grid 100, at most 0.8 off).
inline constexpr int kShrinkSteps = 80;

// Factor on the range at a step of the search.
QM_HD inline float ShrinkFactor(int step) { return 1.0f - static_cast<float>(step) / 100.0f; }

// Unsigned keys in the order of the floats (NaN last or first by sign).
QM_HD inline uint32_t OrderedKey(float x) {
  const uint32_t bits = FloatBits(x);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
// The float of a key.
QM_HD inline float FromOrderedKey(uint32_t key) {
  return FloatFromBits((key & 0x80000000u) != 0 ? key & 0x7FFFFFFFu : ~key);
}

// Position of a quantile among n sorted values, between elements `index` and index + 1.
struct QuantilePosition {
  int64_t index;   // the lower neighbour
  float fraction;  // of the way to the upper one
};
// Where a quantile (0..1) of n values lies.
QM_HD inline QuantilePosition PositionOfQuantile(double quantile, int64_t n) {
  const double position = quantile * static_cast<double>(n - 1);
  const int64_t index = static_cast<int64_t>(position);
  return {index, static_cast<float>(position - static_cast<double>(index))};
}

namespace internal {

inline float JoinLanes(float* lane) {
  for (int half = kAffineLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

// Sum of importance * error^2.
template <bool kWeighted>
inline float AffineError(const float* w, const float* importance, int64_t n, AffineGroup group,
                         float max_code) {
  const auto term = [&](int64_t i) {
    const float d = DecodeAffine(EncodeAffine(w[i], group, max_code), group) - w[i];
    if constexpr (kWeighted) return importance[i] * (d * d);
    return d * d;
  };
  float lane[kAffineLanes] = {};
  int64_t i = 0;
  for (; i + kAffineLanes <= n; i += kAffineLanes) {
    for (int l = 0; l < kAffineLanes; ++l) lane[l] += term(i + l);
  }
  for (int l = 0; i + l < n; ++l) lane[l] += term(i + l);
  return JoinLanes(lane);
}

template <bool kWeighted>
inline AffineGroup SearchAffineGroup(const float* w, const float* importance, int64_t n, float low,
                                     float high, const AffineRule& rule) {
  const float max_code = rule.max_code();
  AffineGroup best = GroupForRange(low, high, rule);
  float best_error = AffineError<kWeighted>(w, importance, n, best, max_code);
  for (int step = 1; step < kShrinkSteps; ++step) {
    const float p = ShrinkFactor(step);
    const AffineGroup group = GroupForRange(p * low, p * high, rule);
    const float error = AffineError<kWeighted>(w, importance, n, group, max_code);
    if (error < best_error) {
      best_error = error;
      best = group;
    }
  }
  return best;
}

inline void Extremes(const float* w, int64_t n, float* low, float* high) {
  float lows[kAffineLanes] = {}, highs[kAffineLanes] = {};
  int64_t i = 0;
  for (; i + kAffineLanes <= n; i += kAffineLanes) {
    for (int l = 0; l < kAffineLanes; ++l) {
      lows[l] = w[i + l] < lows[l] ? w[i + l] : lows[l];
      highs[l] = w[i + l] > highs[l] ? w[i + l] : highs[l];
    }
  }
  for (int l = 0; i + l < n; ++l) {
    lows[l] = w[i + l] < lows[l] ? w[i + l] : lows[l];
    highs[l] = w[i + l] > highs[l] ? w[i + l] : highs[l];
  }
  *low = *high = 0.0f;
  for (int l = 0; l < kAffineLanes; ++l) {
    *low = lows[l] < *low ? lows[l] : *low;
    *high = highs[l] > *high ? highs[l] : *high;
  }
}

// The value with `rank` smaller ones before it, of |w| if `magnitude`: its key bit by bit from the
// top, by counting. Needs no buffer.
inline float SelectRank(const float* w, int64_t n, int64_t rank, bool magnitude) {
  const uint32_t mask = magnitude ? 0x7FFFFFFFu : 0xFFFFFFFFu;
  uint32_t prefix = 0;
  for (int bit = 31; bit >= 0; --bit) {
    int64_t zeros = 0;  // keys that share the prefix and have a 0 here
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = OrderedKey(FloatFromBits(FloatBits(w[i]) & mask));
      zeros += (key >> bit) == (prefix >> bit) ? 1 : 0;
    }
    if (rank >= zeros) {
      rank -= zeros;
      prefix |= 1u << bit;
    }
  }
  return FromOrderedKey(prefix);
}

inline float Quantile(const float* w, int64_t n, double quantile, bool magnitude) {
  const QuantilePosition at = PositionOfQuantile(quantile, n);
  const float below = SelectRank(w, n, at.index, magnitude);
  if (at.fraction == 0.0f) return below;
  const float above = SelectRank(w, n, at.index + 1, magnitude);
  return below + at.fraction * (above - below);
}

}  // namespace internal

// Scale and zero point of one group of n > 0 weights. `importance` (n values, or null for all
// equal) weighs the squared errors of the search.
inline AffineGroup FindAffineGroup(const float* w, int64_t n, const AffineRule& rule,
                                   const AffineSearch& search, const float* importance = nullptr) {
  float low = 0.0f, high = 0.0f;
  if (search.clip == AffineClip::kPercentile) {
    if (rule.symmetric) {
      high = internal::Quantile(w, n, search.percentile, true);
    } else {
      low = internal::Quantile(w, n, 1.0 - search.percentile, false);
      high = internal::Quantile(w, n, search.percentile, false);
    }
  } else {
    internal::Extremes(w, n, &low, &high);
  }
  WidenRange(rule.symmetric, &low, &high);
  if (search.clip != AffineClip::kSquaredError) return GroupForRange(low, high, rule);
  return importance == nullptr
             ? internal::SearchAffineGroup<false>(w, importance, n, low, high, rule)
             : internal::SearchAffineGroup<true>(w, importance, n, low, high, rule);
}

}  // namespace qm

#endif  // QUANTMILL_SDK_AFFINE_SEARCH_HPP_
