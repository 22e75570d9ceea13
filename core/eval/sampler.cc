#include "core/eval/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/base/draw.h"

namespace quantmill {
SplitMix64 StreamOf(uint64_t seed, uint64_t index) {
  // The seed goes through the mixer first, so that neighbouring seeds do not share streams.
  SplitMix64 root(SplitMix64(seed).Next() ^ index);
  return SplitMix64(root.Next());
}

int32_t Sampler::Next(absl::Span<const float> logits) {
  if (options_.temperature <= 0) {
    return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }
  return Draw(logits);
}

int32_t Sampler::Draw(absl::Span<const float> logits) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  weights_.resize(logits.size());
  double total = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    weights_[i] = std::exp((logits[i] - largest) / options_.temperature);
    total += weights_[i];
  }
  if (options_.top_p < 1) return DrawTopP(total);
  return IndexAt(weights_, random_.NextUniform() * total);
}

int32_t Sampler::DrawTopP(double total) {
  order_.resize(weights_.size());
  std::iota(order_.begin(), order_.end(), 0);
  std::sort(order_.begin(), order_.end(), [this](int32_t a, int32_t b) {
    const double wa = weights_[static_cast<size_t>(a)], wb = weights_[static_cast<size_t>(b)];
    return wa != wb ? wa > wb : a < b;
  });
  double kept = 0;
  size_t count = 0;
  while (count < order_.size() && (count == 0 || kept < options_.top_p * total)) {
    kept += weights_[static_cast<size_t>(order_[count++])];
  }
  double left = random_.NextUniform() * kept;
  for (size_t i = 0; i < count; ++i) {
    left -= weights_[static_cast<size_t>(order_[i])];
    if (left < 0) return order_[i];
  }
  return order_[count - 1];
}

}  // namespace quantmill
