// Arithmetic that the CPU path and the kernels share.
#ifndef QUANTMILL_PLUGINS_OFTQ_OFTQ_MATH_H_
#define QUANTMILL_PLUGINS_OFTQ_OFTQ_MATH_H_

#include <cstdint>

#include "quantmill/sdk/tensor.hpp"

namespace quantmill::oftq {

// The truncated series of (I + Q)(I - Q)^-1 = I + 2Q + 2Q^2 + ..., as PEFT sums it (0.21.2,
// tuners/oft/layer.py, _cayley_batch): 2 terms give I + 2Q; from 3 on the last power, Q^(terms-1)
// and at least Q^3, has factor 1.
QM_HD inline int Degree(int terms) {
  if (terms < 2) return 0;
  return terms == 2 ? 1 : (terms < 5 ? 3 : terms - 1);
}
QM_HD inline float Coefficient(int power, int degree) {
  if (power == 0) return 1.0f;
  return power == degree && degree > 1 ? 1.0f : 2.0f;
}

// Where element (i, j), i < j, of a block's triangle is stored.
QM_HD inline int64_t TriangleIndex(int64_t i, int64_t j, int64_t block) {
  return i * block - i * (i + 1) / 2 + (j - i - 1);
}

// 24 random bits in [-1, 1) from a counter: the finalizer of SplitMix64 (Steele, Lea, Flood, "Fast
// Splittable Pseudorandom Number Generators", 2014).
QM_HD inline float UniformAt(uint64_t seed, uint64_t index) {
  uint64_t z = seed + (index + 1) * UINT64_C(0x9E3779B97F4A7C15);
  z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
  z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
  z ^= z >> 31;
  return static_cast<float>(static_cast<int32_t>(z >> 40) - (1 << 23)) * 0x1p-23f;
}

}  // namespace quantmill::oftq

#endif  // QUANTMILL_PLUGINS_OFTQ_OFTQ_MATH_H_
