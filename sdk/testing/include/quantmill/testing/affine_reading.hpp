// Reads qm.fmt.affine-int/1 the slow way, as FORMATS.md words it: for tests of whoever writes it.
#ifndef QUANTMILL_TESTING_AFFINE_READING_HPP_
#define QUANTMILL_TESTING_AFFINE_READING_HPP_

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "quantmill/testing/fake_call.hpp"

namespace qm::testing {

// Everything a packed weight holds, unpacked.
struct AffineContent {
  int64_t rows = 0;        // of the weight
  int64_t cols = 0;        // of the weight
  int64_t groups = 0;      // of a row
  std::vector<int> codes;  // [rows, cols]
  // Scales and zero points.
  std::vector<double> scale, zero;  // [rows, groups]
  std::vector<int> group_of;        // [cols]

  // The weight at row r, column c.
  double Value(int64_t r, int64_t c) const {
    const int64_t g = r * groups + group_of[c];
    return scale[g] * (codes[r * cols + c] - zero[g]);
  }
  // All weights, row-major.
  std::vector<double> Values() const {
    std::vector<double> out;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) out.push_back(Value(r, c));
    }
    return out;
  }
};

// Value of F16 bits.
inline double HalfToDouble(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 0    ? std::ldexp(mantissa, -24)
                           : exponent == 31 ? INFINITY
                                            : std::ldexp(1024 + mantissa, exponent - 25);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// Value of BF16 bits.
inline double BrainToDouble(uint16_t bits) {
  const int exponent = (bits >> 7) & 255, mantissa = bits & 127;
  const double magnitude = exponent == 0     ? std::ldexp(mantissa, -133)
                           : exponent == 255 ? INFINITY
                                             : std::ldexp(128 + mantissa, exponent - 134);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// Elements of a tensor of any of the scale types.
inline std::vector<double> ReadScales(FakeCall& call, const qm_tensor& scale) {
  std::vector<double> out;
  if (scale.dtype == QM_F16) {
    for (const F16 x : call.Read<F16>(scale)) out.push_back(HalfToDouble(x.bits));
  } else if (scale.dtype == QM_BF16) {
    for (const BF16 x : call.Read<BF16>(scale)) out.push_back(BrainToDouble(x.bits));
  } else {
    for (const float x : call.Read<float>(scale)) out.push_back(x);
  }
  return out;
}

inline AffineContent ReadAffine(FakeCall& call, const qm_packed& packed, int bits) {
  AffineContent out;
  out.rows = packed.out_features;
  out.cols = packed.in_features;
  std::vector<int32_t> words;
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    const std::string name = packed.tensors[i].name;
    const qm_tensor& t = packed.tensors[i].tensor;
    if (name == "codes") {
      words = call.Read<int32_t>(t);
    } else if (name == "scale") {
      out.scale = ReadScales(call, t);
      out.groups = t.shape[1];
    } else if (name == "zero") {
      for (const uint8_t z : call.Read<uint8_t>(t)) out.zero.push_back(z);
    } else if (name == "group_index") {
      for (const int32_t g : call.Read<int32_t>(t)) out.group_of.push_back(g);
    } else {
      throw std::runtime_error("unknown tensor " + name);
    }
  }
  if (out.zero.empty()) out.zero.assign(out.scale.size(), std::ldexp(1.0, bits - 1));
  for (int64_t c = 0; out.group_of.size() < static_cast<size_t>(out.cols); ++c) {
    out.group_of.push_back(static_cast<int>(c / (out.cols / out.groups)));
  }
  const int64_t words_per_row = (out.cols * bits + 31) / 32;
  for (int64_t r = 0; r < out.rows; ++r) {
    for (int64_t c = 0; c < out.cols; ++c) {
      int code = 0;
      for (int b = 0; b < bits; ++b) {  // bit by bit, on purpose
        const int64_t at = c * bits + b;
        const uint32_t word = static_cast<uint32_t>(words[r * words_per_row + at / 32]);
        code |= static_cast<int>((word >> (at % 32)) & 1u) << b;
      }
      out.codes.push_back(code);
    }
  }
  return out;
}

}  // namespace qm::testing

#endif  // QUANTMILL_TESTING_AFFINE_READING_HPP_
