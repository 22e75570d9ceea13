#include "core/train/schedule.h"

#include <cmath>

#include "gtest/gtest.h"

namespace quantmill {
namespace {

TEST(WarmupCosine, RisesAndFalls) {
  const WarmupCosine schedule = {2.0, 110, 10, 0.1};
  EXPECT_DOUBLE_EQ(schedule.Rate(1), 0.2);
  EXPECT_DOUBLE_EQ(schedule.Rate(10), 2.0);
  EXPECT_NEAR(schedule.Rate(60), 2.0 * 0.55, 1e-12);  // half way: the mean of peak and floor
  EXPECT_NEAR(schedule.Rate(110), 0.2, 1e-12);
  EXPECT_NEAR(schedule.Rate(500), 0.2, 1e-12);
}

TEST(WarmupCosine, WithoutWarmup) {
  const WarmupCosine schedule = {1.0, 4, 0, 0};
  EXPECT_NEAR(schedule.Rate(2), 0.5, 1e-12);
  EXPECT_NEAR(schedule.Rate(4), 0.0, 1e-12);
}

TEST(ClipFactor, BoundsTheNorm) {
  EXPECT_EQ(ClipFactor(0.5, 1), 1);
  EXPECT_EQ(ClipFactor(4, 1), 0.25);
  EXPECT_EQ(ClipFactor(4, 0), 1);
  EXPECT_EQ(ClipFactor(NAN, 1), 0);
  EXPECT_EQ(ClipFactor(INFINITY, 0), 0);
}

}  // namespace
}  // namespace quantmill
