// The arithmetic of NF4 and FP4 (bitsandbytes: csrc/kernels.cu, bitsandbytes/functional.py,
// bitsandbytes/backends/default/ops.py), the same bits on host and device when compiled without
// contraction.
//
//   code     nearest of 16 values to x = w * (1 / absmax); of two equally near the smaller (nf4),
//   or
//            the one nearer to zero (fp4)
//   weight   codebook[code] * absmax
//   absmax   double quantization: byte = nearest of 256 values to (absmax - mean) / range
#ifndef QUANTMILL_PLUGINS_NF4_NF4_MATH_H_
#define QUANTMILL_PLUGINS_NF4_NF4_MATH_H_

#include <cstdint>

#include "quantmill/sdk/tensor.hpp"

namespace quantmill::nf4 {

inline constexpr int kCodebookSize = 16;
inline constexpr int kByteCodebookSize = 256;

// Quantiles of the normal distribution, scaled to [-1, 1], with an exact 0 (QLoRA,
// arXiv:2305.14314, appendix E; the f32 values are those of functional.py).
inline constexpr float kNf4Codebook[kCodebookSize] = {-1.0f,
                                                      -0.6961928009986877f,
                                                      -0.5250730514526367f,
                                                      -0.39491748809814453f,
                                                      -0.28444138169288635f,
                                                      -0.18477343022823334f,
                                                      -0.09105003625154495f,
                                                      0.0f,
                                                      0.07958029955625534f,
                                                      0.16093020141124725f,
                                                      0.24611230194568634f,
                                                      0.33791524171829224f,
                                                      0.44070982933044434f,
                                                      0.5626170039176941f,
                                                      0.7229568362236023f,
                                                      1.0f};

// Sign, two bits of exponent, one of mantissa, divided by 12: in the order of the bit patterns.
inline constexpr float kFp4Codebook[kCodebookSize] = {
    0.0f, 0.0625f / 12.0f,  8.0f / 12.0f,  1.0f,  4.0f / 12.0f,  0.5f,  2.0f / 12.0f,  0.25f,
    0.0f, -0.0625f / 12.0f, -8.0f / 12.0f, -1.0f, -4.0f / 12.0f, -0.5f, -2.0f / 12.0f, -0.25f};

// Code of weight 0; also of the half byte behind an odd last weight.
inline constexpr int kNf4Zero = 7;
inline constexpr int kFp4Zero = 0;

// Blocks below this largest magnitude are divided by this instead.
inline constexpr float kLeastAbsmax = 1e-38f;

QM_HD inline float Magnitude(float x) { return x < 0.0f ? -x : x; }

// What the weights of a block are multiplied with. Finite.
QM_HD inline float InverseAbsmax(float absmax) {
  return 1.0f / (absmax > kLeastAbsmax ? absmax : kLeastAbsmax);
}

// Rounded once, to nearest, as f32 arithmetic rounds it.
QM_HD constexpr float Midpoint(float a, float b) { return (a + b) * 0.5f; }

// Midpoints of neighbours in order of value; constants of the instruction stream, also on a GPU.
template <int kIndex>
QM_HD inline uint32_t AboveNf4(float x) {
  constexpr float kMiddle = Midpoint(kNf4Codebook[kIndex], kNf4Codebook[kIndex + 1]);
  return x > kMiddle ? 1u : 0u;
}
// Codes of fp4 in order of magnitude: 0, 1, 6, 7, 4, 5, 2, 3.
QM_HD constexpr int Fp4CodeOfRank(int rank) { return rank ^ ((rank & 2) << 1); }
template <int kRank>
QM_HD inline uint32_t AboveFp4(float magnitude) {
  constexpr float kMiddle =
      Midpoint(kFp4Codebook[Fp4CodeOfRank(kRank)], kFp4Codebook[Fp4CodeOfRank(kRank + 1)]);
  return magnitude > kMiddle ? 1u : 0u;
}

// Plain comparisons, so that loops over x vectorise. x is in [-1, 1].
QM_HD inline uint32_t EncodeNf4(float x) {
  return AboveNf4<0>(x) + AboveNf4<1>(x) + AboveNf4<2>(x) + AboveNf4<3>(x) + AboveNf4<4>(x) +
         AboveNf4<5>(x) + AboveNf4<6>(x) + AboveNf4<7>(x) + AboveNf4<8>(x) + AboveNf4<9>(x) +
         AboveNf4<10>(x) + AboveNf4<11>(x) + AboveNf4<12>(x) + AboveNf4<13>(x) + AboveNf4<14>(x);
}

QM_HD inline uint32_t EncodeFp4(float x) {
  const float m = Magnitude(x);
  const uint32_t rank = AboveFp4<0>(m) + AboveFp4<1>(m) + AboveFp4<2>(m) + AboveFp4<3>(m) +
                        AboveFp4<4>(m) + AboveFp4<5>(m) + AboveFp4<6>(m);
  return (rank ^ ((rank & 2u) << 1)) | (x < 0.0f ? 8u : 0u);
}

QM_HD inline uint32_t Encode(float x, bool fp4) { return fp4 ? EncodeFp4(x) : EncodeNf4(x); }

// Index of the nearest of 256 ascending values.
QM_HD inline uint8_t NearestByte(const float* codebook, float x) {
  int low = 0, high = kByteCodebookSize - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (x > Midpoint(codebook[middle], codebook[middle + 1])) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return static_cast<uint8_t>(low);
}

// The byte of a factor; range = largest |absmax - offset| of its nested block.
QM_HD inline uint8_t EncodeAbsmax(const float* codebook, float absmax, float offset, float range) {
  return NearestByte(codebook, (absmax - offset) * InverseAbsmax(range));
}

// Factors that share a range, as bitsandbytes writes them.
inline constexpr int kNestedBlock = 256;
// Partial sums of the mean of the factors: sum k takes factors k, k + 256, ..., in f64; they are
// joined pairwise.
inline constexpr int kMeanLanes = 256;

}  // namespace quantmill::nf4

#endif  // QUANTMILL_PLUGINS_NF4_NF4_MATH_H_
