// Fake quantization of one weight and its derivatives by convention, on host and device.
//
//   s  = stored(clamp(factor, 1/64, 64) * scale_init)     stored(): rounded to the type of scales
//   z  = clamp(round(zero), 0, M)                         M = 2^bits - 1; symmetric: 2^(bits-1)
//   u  = w / s,  v = round(u) + z,  q = clamp(v, 0, M),  w_eff = s (q - z)
//
// Derivatives: EfficientQAT (Chen et al., 2024), quantize/quantizer.py of OpenGVLab/EfficientQAT.
// round(), stored() and the clamps of factor and zero count as the identity; the clamp of the code
// does not:
//
//               d w_eff/d w    d w_eff/d s       d w_eff/d zero
//   0 <= v <= M      1         round(u) - u            0
//   else             0            q - z               -s
//
// and d s/d factor = scale_init.
#ifndef QUANTMILL_PLUGINS_QAT_QAT_MATH_H_
#define QUANTMILL_PLUGINS_QAT_QAT_MATH_H_

#include "quantmill/sdk/affine_int.hpp"

namespace quantmill::qat {

// Where the factor on a scale is held: a scale neither changes sign nor leaves the size of the
// weights.
inline constexpr float kLeastFactor = 1.0f / 64.0f;
inline constexpr float kLargestFactor = 64.0f;

// Parameters of a linear, [out, groups] each, f32.
struct Parameters {
  const float* factor = nullptr;      // trained, 1 at first
  const float* scale_init = nullptr;  // as it was first, positive
  const float* zero = nullptr;        // trained; null when symmetric
};

// The grid that group `index` (row * groups + group) is rounded to.
QM_HD inline qm::AffineGroup GridOf(const Parameters& p, const qm::AffineRule& rule,
                                    int64_t index) {
  float factor = p.factor[index];
  factor = factor > kLeastFactor ? factor : kLeastFactor;
  factor = factor < kLargestFactor ? factor : kLargestFactor;
  const float scale = qm::RoundScale(factor * p.scale_init[index], rule.scale_dtype);
  const float max_code = rule.max_code();
  if (p.zero == nullptr) return {scale, 0.5f * (max_code + 1.0f)};
  float zero = p.zero[index];
  zero = zero > 0.0f ? zero : 0.0f;
  zero = zero < max_code ? zero : max_code;
  return {scale, qm::RoundHalfEven(zero)};
}

// w_eff in f32.
QM_HD inline float FakeQuantize(float w, qm::AffineGroup grid, float max_code) {
  return qm::DecodeAffine(qm::EncodeAffine(w, grid, max_code), grid);
}

// What one weight with derivative g above it adds.
struct Derivative {
  float weight;   // to d w
  float scale;    // to d s
  float clipped;  // to the sum that -s d zero is made of
};
QM_HD inline Derivative Differentiate(float w, float g, qm::AffineGroup grid, float max_code) {
  float u = w / grid.scale;
  u = u > -512.0f ? u : -512.0f;  // as EncodeAffine
  u = u < 512.0f ? u : 512.0f;
  const float v = qm::RoundHalfEven(u) + grid.zero;
  float q = v > 0.0f ? v : 0.0f;
  q = q < max_code ? q : max_code;
  const bool inside = q == v;
  return {inside ? g : 0.0f, g * ((q - grid.zero) - (inside ? u : 0.0f)), inside ? 0.0f : g};
}

// A weight in the cell of code - zero, as near to w as half a cell less a margin allows: what is
// trained starts where the base ended. The margin is larger than what rounding can move.
QM_HD inline float InsideCell(float w, float code, qm::AffineGroup grid) {
  constexpr float kHalfCell = 0.49f;
  const float center = code - grid.zero;
  float offset = w / grid.scale - center;
  offset = offset > -kHalfCell ? offset : -kHalfCell;
  offset = offset < kHalfCell ? offset : kHalfCell;
  return grid.scale * (center + offset);
}

}  // namespace quantmill::qat

#endif  // QUANTMILL_PLUGINS_QAT_QAT_MATH_H_
