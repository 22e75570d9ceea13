#include "host/bench/comparison.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace quantmill {
namespace {

using ::testing::ElementsAre;

TEST(ComparisonTest, TiesAreThoseOfThePairedDifference) {
  // Differences 1, 3: mean 2, standard deviation sqrt 2, standard error 1. 2 <= 2 * 1.
  EXPECT_TRUE(KlIsTied({11, 103}, {10, 100}));
  // Differences 2, 3: mean 2.5, standard error 0.5. The means alone would say nothing: windows
  // differ by more than their difference.
  EXPECT_FALSE(KlIsTied({12, 103}, {10, 100}));
  EXPECT_FALSE(KlIsTied({10, 100}, {12, 103}));
  EXPECT_TRUE(KlIsTied({1, 2}, {1, 2}));
  // Nothing is known of the error.
  EXPECT_FALSE(KlIsTied({1}, {1}));
  EXPECT_FALSE(KlIsTied({}, {}));
  EXPECT_FALSE(KlIsTied({1, 2}, {1, 2, 3}));
}

BenchResultRow Row(const std::string& model, const std::string& name, double size, double rate,
                   std::vector<double> kl) {
  BenchResultRow row;
  row.json = {{"model", model},
              {"row", name},
              {"status", "done"},
              {"size_bytes", size},
              {"tokens_per_second_b1", rate},
              {"tokens_per_second_b1_stderr", 1.0}};
  row.window_kl = std::move(kl);
  return row;
}

TEST(ComparisonTest, RatiosAreToTheModelsOwnOriginal) {
  std::vector<BenchResultRow> rows = {
      Row("a", "q", 25, 30, {0.1, 0.2}), Row("a", "original", 100, 10, {0, 0}),
      Row("a", "r", 50, 5, {0.1, 0.2}), Row("b", "original", 1000, 1, {0, 0}),
      Row("b", "q", 100, 2, {0.1, 0.2})};
  rows[1].baseline = rows[3].baseline = true;
  CompareRows(&rows);
  EXPECT_EQ(rows[0].json["size_ratio"], 0.25);
  EXPECT_EQ(rows[0].json["tokens_per_second_b1_ratio"], 3.0);
  EXPECT_EQ(rows[1].json["size_ratio"], 1.0);
  EXPECT_EQ(rows[2].json["tokens_per_second_b1_ratio"], 0.5);
  EXPECT_EQ(rows[4].json["size_ratio"], 0.1);
  EXPECT_FALSE(rows[0].json.contains("tokens_per_second_b1_stderr_ratio"));
  EXPECT_THAT(rows[0].json["kl_ties"], ElementsAre("r"));
  EXPECT_THAT(rows[2].json["kl_ties"], ElementsAre("q"));
  EXPECT_TRUE(rows[4].json["kl_ties"].empty());
}

TEST(ComparisonTest, AFailedRowIsComparedWithNothing) {
  std::vector<BenchResultRow> rows = {Row("a", "original", 100, 10, {0, 0})};
  rows[0].baseline = true;
  BenchResultRow failed;
  failed.json = {{"model", "a"}, {"row", "bad"}, {"status", "failed"}, {"error", "why"}};
  rows.push_back(failed);
  CompareRows(&rows);
  EXPECT_EQ(rows[1].json, failed.json);
}

}  // namespace
}  // namespace quantmill
