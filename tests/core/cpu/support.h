// What the tests of the CPU backend share: random tensors, their values in f64, tolerances computed
// from the number of terms, and running one operation with several thread counts.
#ifndef QUANTMILL_TESTS_CORE_CPU_SUPPORT_H_
#define QUANTMILL_TESTS_CORE_CPU_SUPPORT_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/tensor/backend.h"
#include "core/threads/thread_pool.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace quantmill::testing {

inline constexpr double kEpsilon = std::numeric_limits<float>::epsilon() / 2;

// Bound for the error of an f32 sum of `terms` products whose magnitudes sum to `magnitude`.
// Rounding errors of independent signs grow with the square root of their number (Higham, Accuracy
// and Stability of Numerical Algorithms, section 2.6); 8 standard deviations and a few final
// roundings.
inline double SumTolerance(int64_t terms, double magnitude) {
  return kEpsilon * (8 * std::sqrt(static_cast<double>(terms)) + 4) * magnitude + 1e-37;
}

// A scalar of a model dtype, through the scalar conversions.
inline void StoreElement(DType dtype, float value, void* base, int64_t index) {
  if (dtype == DType::kF32) static_cast<float*>(base)[index] = value;
  if (dtype == DType::kF16) static_cast<uint16_t*>(base)[index] = F32ToF16(value);
  if (dtype == DType::kBF16) static_cast<uint16_t*>(base)[index] = F32ToBF16(value);
}

inline float LoadElement(DType dtype, const void* base, int64_t index) {
  if (dtype == DType::kF16) return F16ToF32(static_cast<const uint16_t*>(base)[index]);
  if (dtype == DType::kBF16) return BF16ToF32(static_cast<const uint16_t*>(base)[index]);
  return static_cast<const float*>(base)[index];
}

// Normally distributed values.
inline Tensor RandomTensor(Shape shape, uint32_t seed, DType dtype = DType::kF32,
                           float deviation = 1.0f) {
  Tensor tensor = Tensor::Host(dtype, shape).value();
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  for (int64_t i = 0; i < tensor.elements(); ++i) {
    StoreElement(dtype, normal(generator), tensor.data(), i);
  }
  return tensor;
}

// Every element set to a value that no operation writes by itself.
inline Tensor Garbage(Shape shape, DType dtype = DType::kF32) {
  Tensor tensor = Tensor::Host(dtype, shape).value();
  std::memset(tensor.data(), 0xFF, static_cast<size_t>(tensor.bytes()));
  return tensor;
}

inline Tensor Clone(const Tensor& tensor) {
  Tensor copy = Tensor::Host(tensor.dtype(), tensor.shape()).value();
  std::memcpy(copy.data(), tensor.data(), static_cast<size_t>(tensor.bytes()));
  return copy;
}

inline std::vector<double> Values(const Tensor& tensor) {
  std::vector<double> values;
  for (int64_t i = 0; i < tensor.elements(); ++i) {
    values.push_back(LoadElement(tensor.dtype(), tensor.data(), i));
  }
  return values;
}

inline bool SameBytes(const Tensor& a, const Tensor& b) {
  return a.shape() == b.shape() && a.dtype() == b.dtype() &&
         std::memcmp(a.data(), b.data(), static_cast<size_t>(a.bytes())) == 0;
}

// Backends with 1, 2 and 3 threads, made once.
inline Backend& CpuWith(int threads) {
  static std::vector<std::unique_ptr<Backend>> backends = [] {
    std::vector<std::unique_ptr<Backend>> made;
    for (int count : {1, 2, 3}) made.push_back(MakeCpuBackend(count).value());
    return made;
  }();
  return *backends[static_cast<size_t>(threads - 1)];
}
inline Backend& Cpu() { return CpuWith(2); }

// Runs `operation` with 1, 2 and 3 threads on its own output made by `make_output`; expects success
// and equal bytes, and returns the output.
inline Tensor SameForAllThreads(const std::function<Tensor()>& make_output,
                                const std::function<absl::Status(Backend&, Tensor*)>& operation) {
  Tensor first;
  for (int threads : {1, 2, 3}) {
    Tensor out = make_output();
    const absl::Status status = operation(CpuWith(threads), &out);
    EXPECT_TRUE(status.ok()) << status.ToString();
    if (threads == 1) first = out;
    EXPECT_TRUE(SameBytes(first, out))
        << "the result depends on the number of threads, " << threads;
  }
  return first;
}

inline void ExpectInvalid(const absl::Status& status, const std::string& text) {
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status.ToString();
  EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr(text));
}

}  // namespace quantmill::testing

#endif  // QUANTMILL_TESTS_CORE_CPU_SUPPORT_H_
