// The method on a fake host: no program, no model.
#include <gtest/gtest.h>

#include <cmath>

#include "quantmill/testing/affine_reading.hpp"
#include "quantmill/testing/fake_linear.hpp"

namespace {

using qm::testing::FakeCall;
using qm::testing::FakeLinear;

TEST(MyMethod, EveryWeightIsWithinOneStep) {
  for (const char* symmetric : {"false", "true"}) {
    FakeLinear linear(5, 256);
    FakeCall call;
    call.Defaults(linear.method()).Set("symmetric", symmetric);
    qm_packed packed = {};
    ASSERT_EQ(linear.Run(call, &packed), QM_OK) << call.error();
    const qm::testing::AffineContent got = qm::testing::ReadAffine(call, packed, /*bits=*/4);
    for (int64_t i = 0; i < got.rows * got.cols; ++i) {
      const int64_t row = i / got.cols, col = i % got.cols;
      const double step = got.scale[row * got.groups + got.group_of[col]];
      EXPECT_NEAR(got.Value(row, col), linear.weights()[i], 1.001 * step);
    }
    EXPECT_TRUE(call.CanariesIntact());
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
}

}  // namespace
