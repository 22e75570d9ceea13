// Comparison of f32 results with an f64 oracle.
#ifndef QUANTMILL_TESTS_CORE_MODEL_COMPARE_H_
#define QUANTMILL_TESTS_CORE_MODEL_COMPARE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/tensor/tensor.h"
#include "gtest/gtest.h"
#include "tests/core/model/slow_reference.h"

namespace quantmill::testing {

inline double MaxAbs(const Matrix& matrix) {
  double largest = 0;
  for (const auto& row : matrix) {
    for (double value : row) largest = std::max(largest, std::abs(value));
  }
  return largest;
}

// Error allowed after `steps` operations in sequence, each a f32 sum of `terms` products: rounding
// errors of a sum grow like the root of its length (random walk), those of the steps add up; 8 is
// head room for the growth of an error within a step.
inline double FloatTolerance(int64_t terms, int64_t steps, double largest) {
  return 8 * static_cast<double>(steps) * std::sqrt(static_cast<double>(terms)) * 0x1p-24 * largest;
}

// `actual`: F32 [rows, columns] on the host.
inline void ExpectNear(const Tensor& actual, const Matrix& expected, double tolerance) {
  ASSERT_EQ(actual.rank(), 2);
  ASSERT_EQ(actual.dim(0), static_cast<int64_t>(expected.size()));
  double worst = 0;
  for (int64_t i = 0; i < actual.dim(0); ++i) {
    const auto& row = expected[static_cast<size_t>(i)];
    ASSERT_EQ(actual.dim(1), static_cast<int64_t>(row.size()));
    for (int64_t j = 0; j < actual.dim(1); ++j) {
      const double difference =
          actual.as<float>()[i * actual.dim(1) + j] - row[static_cast<size_t>(j)];
      // Not max(): a NaN must not be lost.
      if (!(std::abs(difference) <= worst)) worst = std::abs(difference);
    }
  }
  EXPECT_LE(worst, tolerance) << "largest value " << MaxAbs(expected);
}

}  // namespace quantmill::testing

#endif  // QUANTMILL_TESTS_CORE_MODEL_COMPARE_H_
