// Rounding to nearest, written once more and slowly: what a method's result is compared with.
#ifndef QUANTMILL_SDK_CHECK_PLAIN_ROUNDING_H_
#define QUANTMILL_SDK_CHECK_PLAIN_ROUNDING_H_

#include <cstdint>
#include <string>
#include <vector>

#include "core/tensor/tensor.h"

namespace quantmill::check {

// How weights are rounded: whole numbers of `bits` bits, with an f16 scale per group of input
// channels, and an 8-bit zero point unless symmetric.
struct PlainRule {
  int bits = 4;
  int64_t group = 128;  // divides the input channels
  bool symmetric = false;

  // All bits stored, per weight.
  double bits_per_weight() const;
  std::string ToString() const;  // "4 bits, group 128, asymmetric"
};

// The plain roundings, one with zero points and one without, that store no more than
// `bits_per_weight`: the widest codes that fit, in the smallest groups that fit then. The one
// without is left out where it would use the same groups; both where nothing fits.
std::vector<PlainRule> PlainRulesWithin(double bits_per_weight, int64_t in_features);

// F32 [out, in] host `weight` rounded and back. Asymmetric: the range is that of the group and 0.
// Symmetric: codes from -(2^(bits-1) - 1) to 2^(bits-1) - 1, scale absmax / (2^(bits-1) - 1).
Tensor RoundPlainly(const Tensor& weight, const PlainRule& rule);

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_PLAIN_ROUNDING_H_
