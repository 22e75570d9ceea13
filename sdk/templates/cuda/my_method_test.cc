// The method on a fake host: no program, no model.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "quantmill/testing/affine_reading.hpp"
#include "quantmill/testing/fake_linear.hpp"

namespace {

using qm::testing::FakeCall;
using qm::testing::FakeLinear;

TEST(MyMethod, IsAsCloseAsEvenSteps) {
  constexpr int64_t kGroup = 128;  // the default
  FakeLinear linear(5, 2 * kGroup);
  FakeCall call;
  call.Defaults(linear.method());
  qm_packed packed = {};
  ASSERT_EQ(linear.Run(call, &packed), QM_OK) << call.error();
  const std::vector<float>& w = linear.weights();
  const std::vector<double> got = qm::testing::ReadAffine(call, packed, /*bits=*/4).Values();
  double error = 0, noise = 0;
  for (size_t i = 0; i < w.size(); ++i) error += (got[i] - w[i]) * (got[i] - w[i]);
  for (size_t i = 0; i < w.size(); i += kGroup) {
    const auto [low, high] = std::minmax_element(&w[i], &w[i] + kGroup);
    const double step = (*high - *low) / 15;
    noise += kGroup * step * step / 12;  // of rounding to multiples of step
  }
  EXPECT_LT(error, 1.1 * noise);
  EXPECT_TRUE(call.CanariesIntact());
}

TEST(MyMethod, TheGpuGivesTheBytesOfTheCpu) {
  if (!qm::testing::HaveGpu()) GTEST_SKIP() << "no GPU, or built without CUDA";
  for (const char* bits : {"2", "3", "4", "8"}) {
    FakeLinear linear(7, 384);
    FakeCall cpu, gpu({QM_CUDA, 0});
    cpu.Defaults(linear.method()).Set("bits", bits);
    gpu.Defaults(linear.method()).Set("bits", bits);
    qm_packed packed = {};
    ASSERT_EQ(linear.Run(cpu, &packed), QM_OK) << cpu.error();
    ASSERT_EQ(linear.Run(gpu, &packed), QM_OK) << gpu.error();
    EXPECT_EQ(gpu.Read<int32_t>(0, "codes"), cpu.Read<int32_t>(0, "codes"));
    EXPECT_EQ(gpu.Read<uint8_t>(0, "zero"), cpu.Read<uint8_t>(0, "zero"));
    EXPECT_EQ(qm::testing::ReadScales(gpu, gpu.EmittedTensor(0, "scale")),
              qm::testing::ReadScales(cpu, cpu.EmittedTensor(0, "scale")));
  }
}

TEST(MyMethod, RefusesWhatItCannotQuantize) {
  FakeLinear linear(5, 256);
  qm_packed packed = {};
  qm_quant_plan plan = {};
  FakeCall uneven;
  uneven.Defaults(linear.method()).Set("group_size", "96");
  EXPECT_EQ(linear.Plan(uneven, &plan), QM_INVALID_ARGUMENT);
  linear.weights()[300] = NAN;
  FakeCall call;
  call.Defaults(linear.method());
  EXPECT_EQ(linear.Run(call, &packed), QM_INVALID_ARGUMENT);
  if (!qm::testing::HaveGpu()) return;
  FakeCall gpu({QM_CUDA, 0});
  gpu.Defaults(linear.method());
  EXPECT_EQ(linear.Run(gpu, &packed), QM_INVALID_ARGUMENT);
}

}  // namespace
