#include <cmath>
#include <memory>

#include "core/model/decoder.h"
#include "gtest/gtest.h"
#include "tests/core/model/random_model.h"

namespace quantmill {
namespace {

using testing::SmallConfig;

// The frequency of a pair, read off the tables at position 1.
double Frequency(const RopeTables& tables, int64_t pair) {
  const int64_t pairs = tables.cosine.dim(1);
  return std::atan2(tables.sine.as<float>()[pairs + pair], tables.cosine.as<float>()[pairs + pair]);
}

// Llama-3.2: theta 5e5, head 64, factor 32, 8192 original positions; expected values worked out
// with the formulas of transformers' modeling_rope_utils.py.
TEST(RopeTest, Llama3Frequencies) {
  const auto backend = MakeCpuBackend(1).value();
  const ModelConfig config =
      ParseModelConfig(SmallConfig("llama", {{"head_dim", 64},
                                             {"rope_theta", 500000.0},
                                             {"rope_scaling",
                                              {{"rope_type", "llama3"},
                                               {"factor", 32.0},
                                               {"low_freq_factor", 1.0},
                                               {"high_freq_factor", 4.0},
                                               {"original_max_position_embeddings", 8192}}}}))
          .value();
  const RopeTables tables = MakeRopeTables(config, 2, *backend).value();
  ASSERT_EQ(tables.cosine.shape(), Shape({2, 32}));
  EXPECT_NEAR(Frequency(tables, 0), 1.0, 1e-6);
  EXPECT_NEAR(Frequency(tables, 14), 3.21145e-3, 1e-8);
  EXPECT_NEAR(Frequency(tables, 15), 1.29055e-3, 1e-8);
  EXPECT_NEAR(Frequency(tables, 16), 4.29557e-4, 1e-9);
  EXPECT_NEAR(Frequency(tables, 17), 9.70829e-5, 1e-10);
  EXPECT_NEAR(Frequency(tables, 18), 1.94616e-5, 1e-10);
  EXPECT_NEAR(Frequency(tables, 31), 9.41831e-8, 1e-12);
}

TEST(RopeTest, LinearScalingDividesPositions) {
  const auto backend = MakeCpuBackend(1).value();
  const ModelConfig plain = ParseModelConfig(SmallConfig("llama")).value();
  const ModelConfig scaled =
      ParseModelConfig(
          SmallConfig("llama", {{"rope_scaling", {{"rope_type", "linear"}, {"factor", 4.0}}}}))
          .value();
  const RopeTables a = MakeRopeTables(plain, 4, *backend).value();
  const RopeTables b = MakeRopeTables(scaled, 13, *backend).value();
  for (int64_t pair = 0; pair < 8; ++pair) {
    for (int64_t position = 0; position < 4; ++position) {
      EXPECT_FLOAT_EQ(a.cosine.as<float>()[position * 8 + pair],
                      b.cosine.as<float>()[4 * position * 8 + pair]);
    }
  }
}

TEST(RopeTest, FirstPositionIsNotRotated) {
  const auto backend = MakeCpuBackend(1).value();
  const RopeTables tables =
      MakeRopeTables(ParseModelConfig(SmallConfig("llama")).value(), 1, *backend).value();
  for (int64_t pair = 0; pair < 8; ++pair) {
    EXPECT_EQ(tables.cosine.as<float>()[pair], 1.0f);
    EXPECT_EQ(tables.sine.as<float>()[pair], 0.0f);
  }
}

TEST(RopeTest, NoPositions) {
  const auto backend = MakeCpuBackend(1).value();
  const ModelConfig config = ParseModelConfig(SmallConfig("llama")).value();
  EXPECT_TRUE(absl::IsInvalidArgument(MakeRopeTables(config, 0, *backend).status()));
}

}  // namespace
}  // namespace quantmill
