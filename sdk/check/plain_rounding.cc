#include "sdk/check/plain_rounding.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "absl/strings/str_cat.h"
#include "core/tensor/dtype.h"

namespace quantmill::check {
namespace {

// As stored: an f16 neither 0 nor infinite.
double StoredScale(double scale) {
  constexpr double kLargest = 65504.0, kSmallest = 0x1p-24;
  return F16ToF32(F32ToF16(static_cast<float>(std::clamp(scale, kSmallest, kLargest))));
}

void RoundGroup(const float* in, int64_t count, const PlainRule& rule, float* out) {
  const auto [low_at, high_at] = std::minmax_element(in, in + count);
  const double low = std::min<double>(*low_at, 0.0), high = std::max<double>(*high_at, 0.0);
  if (low == high) {
    std::fill(out, out + count, 0.0f);
    return;
  }
  double least = 0.0, most = std::exp2(rule.bits) - 1.0, scale = 0.0, zero = 0.0;
  if (rule.symmetric) {
    most = std::max(1.0, std::exp2(rule.bits - 1) - 1.0);
    least = -most;
    scale = StoredScale(std::max(-low, high) / most);
  } else {
    scale = StoredScale((high - low) / most);
    zero = std::clamp(std::nearbyint(-low / scale), least, most);
  }
  for (int64_t i = 0; i < count; ++i) {
    const double code = std::clamp(std::nearbyint(in[i] / scale) + zero, least, most);
    out[i] = static_cast<float>(scale * (code - zero));
  }
}

// The smallest group, a power of two or a whole row, that stays within `bits_per_weight`.
std::optional<PlainRule> SmallestGroup(int bits, bool symmetric, double bits_per_weight,
                                       int64_t in_features) {
  PlainRule rule = {bits, 8, symmetric};
  for (; rule.group < in_features; rule.group *= 2) {
    if (in_features % rule.group == 0 && rule.bits_per_weight() <= bits_per_weight) return rule;
  }
  rule.group = in_features;
  if (rule.bits_per_weight() <= bits_per_weight) return rule;
  return std::nullopt;
}

}  // namespace

double PlainRule::bits_per_weight() const {
  return bits + (symmetric ? 16.0 : 24.0) / static_cast<double>(group);
}

std::string PlainRule::ToString() const {
  return absl::StrCat(bits, " bits, group ", group, symmetric ? ", symmetric" : ", asymmetric");
}

std::vector<PlainRule> PlainRulesWithin(double bits_per_weight, int64_t in_features) {
  constexpr int kWidest = 8;
  std::vector<PlainRule> rules;
  for (const bool symmetric : {false, true}) {
    for (int bits = std::min(kWidest, static_cast<int>(bits_per_weight)); bits >= 1; --bits) {
      const auto rule = SmallestGroup(bits, symmetric, bits_per_weight, in_features);
      if (!rule) continue;
      rules.push_back(*rule);
      break;
    }
  }
  // Room for zero points in the same groups is room that plain rounding would use.
  if (rules.size() == 2 && rules[0].bits == rules[1].bits && rules[0].group == rules[1].group) {
    rules.pop_back();
  }
  return rules;
}

Tensor RoundPlainly(const Tensor& weight, const PlainRule& rule) {
  std::vector<float> out(static_cast<size_t>(weight.elements()));
  for (int64_t i = 0; i < weight.elements(); i += rule.group) {
    RoundGroup(weight.as<float>() + i, rule.group, rule, out.data() + i);
  }
  return Tensor::FromF32(weight.shape(), out);
}

}  // namespace quantmill::check
