// The arithmetic of HQQ (dropbox/hqq: hqq/core/quantize.py, hqq/core/optimize.py), the same bits on
// host and device when compiled without contraction.
//
//   scale    S = max(range / M, 1 / 20000), M = 2^bits - 1; S = 1 where range <= 1e-4
//   start    z = -low / S
//   code     q = clamp(round(w / S + z), 0, M), half to even
//   weight   (q - z) S
//   step     R = W - (q - z) S;  E = shrink(R);  z = mean over the group of (q - (W - E) / S)
//
// The scale is rounded to what is stored before z is looked for.
#ifndef QUANTMILL_PLUGINS_HQQ_HQQ_MATH_H_
#define QUANTMILL_PLUGINS_HQQ_HQQ_MATH_H_

#include "hqq.h"

namespace quantmill::hqq {

inline constexpr float kLeastRange = 1e-4f;
inline constexpr float kLeastScale = 1.0f / 2e4f;
// Beyond this a 16-bit zero point is coarser than a code; the range is then made to contain 0.
inline constexpr float kLargestZero = 2048.0f;
inline constexpr float kHalfMax = 65504.0f;

// What a group starts from. `low` may have become 0.
struct Start {
  float scale;
  float low;
};

QM_HD inline float ScaleForRange(float low, float high, const Options& o) {
  const float range = high - low;
  float scale = range > kLeastRange ? range / o.max_code() : 1.0f;
  scale = scale > kLeastScale ? scale : kLeastScale;
  // Bytes are fitted to the exact scales.
  return qm::RoundScale(scale, o.quantize_scale ? QM_F32 : o.scale_dtype);
}

QM_HD inline Start StartOfGroup(float low, float high, const Options& o) {
  float scale = ScaleForRange(low, high, o);
  const float zero = -low / scale;
  if (zero > kLargestZero || zero < -kLargestZero) {
    low = low < 0.0f ? low : 0.0f;
    high = high > 0.0f ? high : 0.0f;
    scale = ScaleForRange(low, high, o);
  }
  return {scale, low + 0.0f};  // not -0, whichever zero came first
}

// A group under way. inverse = 1 / scale.
struct Group {
  float scale, inverse, zero;
};

// Within what f16 holds; NaN (from weights near the end of f32) becomes the lower end.
QM_HD inline float BoundZero(float zero) {
  zero = zero > -kHalfMax ? zero : -kHalfMax;
  return zero < kHalfMax ? zero : kHalfMax;
}

QM_HD inline float FirstZero(float low, float inverse) { return BoundZero(-low * inverse); }

QM_HD inline float RoundZero(float zero, qm_dtype dtype) {
  if (dtype == QM_F16) return qm::ToFloat(qm::ToF16(zero));
  if (dtype == QM_BF16) return qm::ToFloat(qm::ToBF16(zero));
  return zero;
}

QM_HD inline float Encode(float w, const Group& g, float max_code) {
  float q = w * g.inverse + g.zero;
  q = q > 0.0f ? q : 0.0f;
  q = q < max_code ? q : max_code;
  return qm::RoundHalfEven(q);
}

// log2 of a positive normal number: exponent plus a series in (m - 1) / (m + 1), off by < 1e-7.
QM_HD inline float Log2(float x) {
  const uint32_t bits = qm::FloatBits(x);
  // Mantissa in [sqrt(1/2), sqrt(2)).
  const int32_t exponent = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  const float m = qm::FloatFromBits(bits - (static_cast<uint32_t>(exponent) << 23));
  const float t = (m - 1.0f) / (m + 1.0f), t2 = t * t;
  float series = 0.32059889f;  // 2 / (9 ln 2), then / 7, 5, 3, 1
  series = series * t2 + 0.41219858f;
  series = series * t2 + 0.57707802f;
  series = series * t2 + 0.96179669f;
  series = series * t2 + 2.88539008f;
  return static_cast<float>(exponent) + t * series;
}

// 2^x for |x| < 126, off by < 1e-6 relative.
QM_HD inline float Exp2(float x) {
  x = x > -125.0f ? x : -125.0f;
  x = x < 125.0f ? x : 125.0f;
  const float whole = qm::RoundHalfEven(x), f = x - whole;
  float p = 1.5403530e-4f;  // ln(2)^k / k!
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return p * qm::FloatFromBits(static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23);
}

QM_HD inline float Shrink(float r, const Step& step, float norm) {
  const float size = r < 0.0f ? -r : r;
  if (!(size > step.threshold)) return 0.0f;
  const float shrunk = size - step.inverse_beta * Exp2((norm - 1.0f) * Log2(size));
  const float e = shrunk > 0.0f ? shrunk : 0.0f;
  return r < 0.0f ? -e : e;
}

// A byte of a range (step, offset), and what it stands for.
struct Range {
  float step, offset;
};
QM_HD inline Range ByteRange(float low, float high) {
  const float step = (high - low) / 255.0f;
  return {step < 3e38f ? step : 0.0f, low};
}
QM_HD inline uint8_t ToByte(float x, const Range& range) {
  if (!(range.step > 0.0f)) return 0;
  float q = (x - range.offset) / range.step;
  q = q < 255.0f ? q : 255.0f;
  return static_cast<uint8_t>(qm::RoundHalfEven(q));
}
QM_HD inline float FromByte(uint8_t byte, const Range& range) {
  return range.offset + range.step * static_cast<float>(byte);
}

}  // namespace quantmill::hqq

#endif  // QUANTMILL_PLUGINS_HQQ_HQQ_MATH_H_
