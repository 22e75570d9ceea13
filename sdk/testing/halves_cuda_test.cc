// 16-bit floats are converted by instructions in kernels and by arithmetic on the host: the same
// bits, but for the payload of a NaN.
#include "halves_cuda.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "quantmill/sdk/tensor.hpp"

namespace qm_halves {
namespace {

class HalvesCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!HaveGpu()) GTEST_SKIP() << "no GPU here";
  }
};

TEST_F(HalvesCuda, EveryHalfBecomesTheSameFloat) {
  const std::vector<uint32_t> got = FloatsOfHalves();
  ASSERT_EQ(got.size(), 65536u);
  for (uint32_t i = 0; i < 65536; ++i) {
    const float want = qm::ToFloat(qm::F16{static_cast<uint16_t>(i)});
    if (std::isnan(want)) {
      ASSERT_TRUE(std::isnan(qm::FloatFromBits(got[i]))) << i;
    } else {
      ASSERT_EQ(got[i], qm::FloatBits(want)) << i;
    }
  }
}

// Every half, the middle between it and the next one, and the floats on both sides of that.
TEST_F(HalvesCuda, FloatsAreRoundedTheSame) {
  std::vector<float> floats = {INFINITY,
                               -INFINITY,
                               65519.99f,
                               65520.0f,
                               1e30f,
                               -1e-30f,
                               std::numeric_limits<float>::denorm_min()};
  for (uint32_t i = 0; i < 0x7C00; ++i) {
    const float low = qm::ToFloat(qm::F16{static_cast<uint16_t>(i)});
    const float high = qm::ToFloat(qm::F16{static_cast<uint16_t>(i + 1)});
    const float middle = 0.5f * (low + (std::isinf(high) ? 65536.0f : high));
    for (const float x :
         {low, middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 1e9f)}) {
      floats.push_back(x);
      floats.push_back(-x);
    }
  }
  const std::vector<uint16_t> got = HalvesOfFloats(floats);
  for (size_t i = 0; i < floats.size(); ++i) {
    ASSERT_EQ(got[i], qm::ToF16(floats[i]).bits) << floats[i];
  }
  const uint16_t nan = HalvesOfFloats({NAN}).front();
  EXPECT_TRUE(std::isnan(qm::ToFloat(qm::F16{nan})));
}

}  // namespace
}  // namespace qm_halves
