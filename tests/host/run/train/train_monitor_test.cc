// When a training counts as failed.
#include "host/run/train/train_monitor.h"

#include <limits>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace quantmill {
namespace {

using ::testing::HasSubstr;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Feeds losses until one ends the training; NaN: a skipped step.
struct Watched {
  explicit Watched(int64_t steps) : steps(steps) {}
  absl::Status Feed(const std::vector<double>& losses) {
    for (double loss : losses) {
      ++position.step;
      const absl::Status status = WatchLoss(loss, false, steps, &position);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }
  int64_t steps;
  TrainPosition position;
};

TEST(WatchLossTest, TenInARowThatAreNotFiniteEndIt) {
  for (const double bad : {kNan, std::numeric_limits<double>::infinity()}) {
    Watched run(1000);
    ASSERT_TRUE(run.Feed({2, 2, 2}).ok());
    ASSERT_TRUE(run.Feed(std::vector<double>(9, bad)).ok());
    ASSERT_TRUE(run.Feed({2}).ok());  // in a row only
    EXPECT_EQ(run.position.skipped_in_row, 0);
    ASSERT_TRUE(run.Feed(std::vector<double>(9, bad)).ok());
    const absl::Status status = run.Feed({bad});
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(status.message()),
                HasSubstr("the training failed at step 23; the loss or its gradients were not "
                          "finite 10 steps in a row; use a smaller train.lr, or more warmup"));
    EXPECT_EQ(run.position.recent_loss, 2);
  }
}

TEST(WatchLossTest, SkippedStepsCountWithAFiniteLoss) {
  TrainPosition position;
  for (int step = 1; step <= 10; ++step) {
    position.step = step;
    EXPECT_EQ(WatchLoss(1, true, 100, &position).ok(), step < 10);
  }
}

TEST(WatchLossTest, MeansOverTheFirstAndTheLastSteps) {
  Watched run(16);  // a quarter: 4
  ASSERT_TRUE(run.Feed({4, 3, 2, 3}).ok());
  EXPECT_DOUBLE_EQ(run.position.first_loss, 3);
  ASSERT_TRUE(run.Feed({1}).ok());
  EXPECT_DOUBLE_EQ(run.position.first_loss, 3);
  EXPECT_DOUBLE_EQ(run.position.recent_loss, 2.5);
}

TEST(WatchLossTest, DivergesFromTheLowest) {
  Watched run(400);
  ASSERT_TRUE(run.Feed(std::vector<double>(20, 2.0)).ok());
  ASSERT_TRUE(run.Feed(std::vector<double>(200, 0.5)).ok());
  // Means towards 3 pass 4 * 0.5 in the 19th step: 3 - 2.5 * 0.95^n > 2.
  ASSERT_TRUE(run.Feed(std::vector<double>(17, 3.0)).ok());
  const absl::Status status = run.Feed(std::vector<double>(3, 3.0));
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("the training diverged at step 23"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("the loss grew from 0.5"));
}

// All but the first of the steps that are averaged at first.
TEST(WatchLossTest, ExplosionInTheFirstStepsIsSeen) {
  Watched run(30);  // 7
  EXPECT_THAT(std::string(run.Feed({0.5, 12, 11, 9, 7, 6, 6, 6, 6}).message()),
              HasSubstr("the training diverged at step 8; the loss grew from 0.5"));
}

TEST(WatchLossTest, OnePeakIsForgiven) {
  Watched run(400);
  ASSERT_TRUE(run.Feed(std::vector<double>(40, 1.0)).ok());
  EXPECT_TRUE(run.Feed({40}).ok());  // the mean of 20 is about 3
  EXPECT_TRUE(run.Feed(std::vector<double>(100, 1.0)).ok());
  EXPECT_NEAR(run.position.recent_loss, 1, 0.02);
}

// Four times as much, but little.
TEST(WatchLossTest, SmallLossesMayGrow) {
  Watched run(400);
  ASSERT_TRUE(run.Feed(std::vector<double>(20, 0.0)).ok());
  EXPECT_TRUE(run.Feed(std::vector<double>(300, 0.9)).ok());
}

// The first loss of a short training may be one that was skipped.
TEST(WatchLossTest, SkippedAtFirst) {
  for (const int64_t steps : {1, 2, 7, 8, 40}) {
    Watched run(steps);
    ASSERT_TRUE(run.Feed({kNan}).ok());
    EXPECT_TRUE(run.Feed(std::vector<double>(12, 3.5)).ok()) << steps;
    EXPECT_DOUBLE_EQ(run.position.first_loss, 3.5) << steps;
    EXPECT_DOUBLE_EQ(run.position.recent_loss, 3.5) << steps;
  }
}

}  // namespace
}  // namespace quantmill
