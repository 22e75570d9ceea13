#include "core/eval/sampler.h"

#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace quantmill {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// Published outputs for seed 1234567 (Rosetta Code, "Pseudo-random numbers/Splitmix64").
TEST(SplitMix64Test, KnownOutputs) {
  SplitMix64 random(1234567);
  for (uint64_t expected : {6457827717110365317u, 3203168211198807973u, 9817491932198370423u,
                            4593380528125082431u, 16408922859458223821u}) {
    EXPECT_EQ(random.Next(), expected);
  }
}

TEST(SplitMix64Test, UniformIsBelowOne) {
  SplitMix64 random(3);
  double sum = 0;
  for (int i = 0; i < 10000; ++i) {
    const double value = random.NextUniform();
    ASSERT_GE(value, 0.0);
    ASSERT_LT(value, 1.0);
    sum += value;
  }
  // Standard deviation of the mean: 0.289 / 100.
  EXPECT_NEAR(sum / 10000, 0.5, 4 * 0.00289);
}

TEST(SplitMix64Test, StreamsDiffer) {
  std::set<uint64_t> first;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    for (uint64_t index = 0; index < 50; ++index) {
      EXPECT_TRUE(first.insert(StreamOf(seed, index).Next()).second);
    }
  }
}

TEST(SamplerTest, GreedyTakesTheLowestOfEqualLogits) {
  Sampler sampler({});
  EXPECT_EQ(sampler.Next({0.5f, 2.0f, 2.0f, -1.0f}), 1);
}

TEST(SamplerTest, FrequenciesFollowProbabilities) {
  SamplingOptions options;
  options.temperature = 2.0;
  options.seed = 9;
  Sampler sampler(options);
  const std::vector<float> logits = {0.0f, 1.0f, kNever, 3.0f};
  std::vector<double> expected(4, 0.0), seen(4, 0.0);
  double total = 0;
  for (size_t i = 0; i < 4; ++i) total += expected[i] = std::exp(logits[i] / 2.0);
  constexpr int kDraws = 20000;
  for (int i = 0; i < kDraws; ++i) seen[static_cast<size_t>(sampler.Next(logits))] += 1;
  for (size_t i = 0; i < 4; ++i) {
    const double p = expected[i] / total;
    EXPECT_NEAR(seen[i] / kDraws, p, 4 * std::sqrt(p * (1 - p) / kDraws) + 1e-12);
  }
  EXPECT_EQ(seen[2], 0.0);
}

TEST(SamplerTest, TopPKeepsTheSmallestSetThatReachesIt) {
  SamplingOptions options;
  options.temperature = 1.0;
  options.seed = 4;
  // Probabilities 0.2, 0.5, 0.3.
  const std::vector<float> logits = {std::log(0.2f), std::log(0.5f), std::log(0.3f)};
  const auto seen = [&](double top_p) {
    options.top_p = top_p;
    Sampler sampler(options);
    std::set<int32_t> tokens;
    for (int i = 0; i < 500; ++i) tokens.insert(sampler.Next(logits));
    return tokens;
  };
  EXPECT_EQ(seen(0.01), (std::set<int32_t>{1}));
  EXPECT_EQ(seen(0.45), (std::set<int32_t>{1}));
  EXPECT_EQ(seen(0.6), (std::set<int32_t>{1, 2}));
  EXPECT_EQ(seen(0.9), (std::set<int32_t>{0, 1, 2}));
  EXPECT_EQ(seen(1.0), (std::set<int32_t>{0, 1, 2}));
}

TEST(SamplerTest, ColdSamplingIsGreedy) {
  SamplingOptions options;
  options.temperature = 1e-6;
  Sampler sampler(options);
  for (int i = 0; i < 20; ++i) EXPECT_EQ(sampler.Next({1.0f, 1.1f, 0.9f}), 1);
}

}  // namespace
}  // namespace quantmill
