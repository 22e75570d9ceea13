// What the tests of drawing from logits share: what DrawRows promises, in f64.
#ifndef QUANTMILL_TESTS_CORE_CPU_DRAW_SUPPORT_H_
#define QUANTMILL_TESTS_CORE_CPU_DRAW_SUPPORT_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "tests/core/cpu/support.h"

namespace quantmill::testing {

// Evenly spread over [0, 1), its ends among them, in an order that has nothing to do with the
// rows'.
inline Tensor Uniforms(int64_t rows, uint32_t seed) {
  Tensor uniforms = Tensor::Host(DType::kF64, {rows}).value();
  double* values = uniforms.as<double>();
  for (int64_t i = 0; i < rows; ++i) values[i] = static_cast<double>(i) / static_cast<double>(rows);
  if (rows > 1) values[rows - 1] = 1 - 0x1p-53;
  std::shuffle(values, values + rows, std::mt19937(seed));
  return uniforms;
}

// Expects each token to be the one whose share of the unit interval holds the row's uniform, up to
// the error of weights exp(x - max x) that are computed in f32: 4 units in the last place for the
// exponential and the sum's share of it, and |x - max x| for the difference's rounding.
inline void ExpectDrawn(const Tensor& logits, const std::vector<int32_t>& excluded,
                        const Tensor& uniforms, const Tensor& tokens) {
  const int64_t vocab = logits.dim(1);
  const std::vector<double> all = Values(logits);
  for (int64_t row = 0; row < logits.dim(0); ++row) {
    std::vector<double> weights(all.begin() + row * vocab, all.begin() + (row + 1) * vocab);
    for (int32_t id : excluded) weights[static_cast<size_t>(id)] = -INFINITY;
    const double largest = *std::max_element(weights.begin(), weights.end());
    double total = 0, error = 0;
    for (double& weight : weights) {
      const double below = largest - weight;
      weight = std::exp(-below);
      total += weight;
      if (weight > 0) error += weight * kEpsilon * (4 + below);
    }
    const int32_t token = tokens.as<const int32_t>()[row];
    ASSERT_TRUE(token >= 0 && token < vocab) << token;
    double before = 0;
    for (int32_t v = 0; v < token; ++v) before += weights[static_cast<size_t>(v)];
    const double share = weights[static_cast<size_t>(token)];
    const double wanted = uniforms.as<const double>()[row] * total;
    EXPECT_GT(share, 0) << row;
    EXPECT_GE(wanted, before - error) << row;
    EXPECT_LE(wanted, before + share + error) << row;
  }
}

}  // namespace quantmill::testing

#endif  // QUANTMILL_TESTS_CORE_CPU_DRAW_SUPPORT_H_
