// What the tests of the CUDA backend share. Every operation runs on the GPU in one of the
// activation dtypes and on the CPU backend in f32 over the same (rounded) inputs; outputs on the
// GPU are filled with NaN beforehand; bounds are computed from the number of terms and the dtype.
#ifndef QUANTMILL_TESTS_CORE_CUDA_SUPPORT_H_
#define QUANTMILL_TESTS_CORE_CUDA_SUPPORT_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/tensor/backend.h"
#include "gtest/gtest.h"
#include "tests/core/cpu/support.h"

namespace quantmill::testing {

// The backend on GPU 0, made once per dtype; why not, where there is none.
inline absl::StatusOr<Backend*> CudaOrWhyNot(DType dtype) {
  static auto& backends = *new std::map<DType, std::unique_ptr<Backend>>();
  if (backends[dtype] == nullptr) {
    absl::StatusOr<std::unique_ptr<Backend>> made = MakeCudaBackend(0, dtype, 2);
    if (!made.ok()) return made.status();
    backends[dtype] = std::move(made).value();
  }
  return backends[dtype].get();
}

// Largest relative error of one rounding to the dtype.
inline double UnitRoundoff(DType dtype) {
  if (dtype == DType::kF16) return 0x1p-11;
  if (dtype == DType::kBF16) return 0x1p-8;
  return 0x1p-24;
}

// A test over the three activation dtypes.
class CudaTest : public ::testing::TestWithParam<DType> {
 protected:
  void SetUp() override {
    const absl::StatusOr<Backend*> made = CudaOrWhyNot(GetParam());
    if (!made.ok()) GTEST_SKIP() << made.status().message();
    cuda_ = *made;
  }
  Backend& cuda() { return *cuda_; }
  DType dtype() const { return GetParam(); }

  // Random values in `dtype` on the host; `on_gpu` and `in_f32` are the two views of them.
  Tensor Random(Shape shape, uint32_t seed, float deviation = 1.0f) {
    return RandomTensor(shape, seed, dtype(), deviation);
  }
  Tensor OnGpu(const Tensor& host) { return cuda().ToDevice(host).value(); }
  Tensor Poisoned(Shape shape, DType type) { return OnGpu(Garbage(shape, type)); }
  Tensor Poisoned(Shape shape) { return Poisoned(shape, dtype()); }
  Tensor OnHost(const Tensor& gpu) {
    Tensor host = Garbage(gpu.shape(), gpu.dtype());
    const absl::Status status = cuda().Copy(gpu, &host);
    EXPECT_TRUE(status.ok()) << status.ToString();
    return host;
  }

 private:
  Backend* cuda_ = nullptr;
};

inline std::string DTypeTestName(const ::testing::TestParamInfo<DType>& info) {
  return std::string(DTypeName(info.param));
}
#define QM_CUDA_TEST_SUITE(suite)                                                     \
  INSTANTIATE_TEST_SUITE_P(Activations, suite,                                        \
                           ::testing::Values(DType::kF32, DType::kF16, DType::kBF16), \
                           ::quantmill::testing::DTypeTestName)

inline Tensor InF32(const Tensor& host) {
  Tensor copy = Tensor::Host(DType::kF32, host.shape()).value();
  for (int64_t i = 0; i < host.elements(); ++i) {
    copy.as<float>()[i] = LoadElement(host.dtype(), host.data(), i);
  }
  return copy;
}

inline Tensor Abs(const Tensor& host) {
  Tensor copy = InF32(host);
  for (int64_t i = 0; i < copy.elements(); ++i)
    copy.as<float>()[i] = std::fabs(copy.as<float>()[i]);
  return copy;
}

inline double MaxAbsOf(const Tensor& host) {
  double largest = 0;
  for (double value : Values(host)) largest = std::max(largest, std::fabs(value));
  return largest;
}

// |actual - expected| <= bound(i) + one rounding to actual's dtype, for every element. NaN fails.
inline void ExpectWithin(const Tensor& actual, const Tensor& expected,
                         const std::function<double(int64_t)>& bound) {
  ASSERT_EQ(actual.elements(), expected.elements());
  constexpr double kSmallestF16 = 0x1p-25;  // half the spacing of subnormal F16 numbers
  const double u = UnitRoundoff(actual.dtype());
  const double floor = actual.dtype() == DType::kF16 ? kSmallestF16 : 0;
  int shown = 0;
  for (int64_t i = 0; i < actual.elements() && shown < 5; ++i) {
    const double a = LoadElement(actual.dtype(), actual.data(), i);
    const double e = LoadElement(expected.dtype(), expected.data(), i);
    const double allowed = bound(i) + u * (std::fabs(e) + bound(i)) + floor;
    if (!(std::fabs(a - e) <= allowed)) {
      ADD_FAILURE() << "element " << i << ": " << a << ", expected " << e << " within " << allowed;
      ++shown;
    }
  }
}
inline void ExpectWithin(const Tensor& actual, const Tensor& expected, double bound) {
  ExpectWithin(actual, expected, [bound](int64_t) { return bound; });
}

#define QM_EXPECT_OK(expression)                         \
  do {                                                   \
    const absl::Status qm_status = (expression);         \
    EXPECT_TRUE(qm_status.ok()) << qm_status.ToString(); \
  } while (false)
#define QM_ASSERT_OK(expression)                         \
  do {                                                   \
    const absl::Status qm_status = (expression);         \
    ASSERT_TRUE(qm_status.ok()) << qm_status.ToString(); \
  } while (false)

}  // namespace quantmill::testing

#endif  // QUANTMILL_TESTS_CORE_CUDA_SUPPORT_H_
