#include "host/bench/generation_speed.h"

#include <algorithm>
#include <memory>

#include "core/eval/logits.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/core/model/random_model.h"
#include "tests/core/model/slow_reference.h"

namespace quantmill {
namespace {

using ::testing::HasSubstr;
using testing::MakeRandomModel;
using testing::SmallConfig;

class GenerationSpeedTest : public ::testing::Test {
 protected:
  Tensor LogitsOf(const std::vector<int32_t>& ids) {
    Tensor tensor = Tensor::Host(DType::kI32, {1, static_cast<int64_t>(ids.size())}).value();
    std::copy(ids.begin(), ids.end(), tensor.as<int32_t>());
    return ComputeLogits(*backend_, *source_, tensor).value();
  }

  nlohmann::ordered_json config_ = SmallConfig("llama");
  std::unique_ptr<Backend> backend_ = MakeCpuBackend(2).value();
  std::unique_ptr<testing::MemorySource> source_ = MakeRandomModel(config_, 31);
  ResidentModel model_ = ResidentModel::Load(*backend_, *source_).value();
  const std::vector<std::vector<int32_t>> prompts_ = {{1, 2, 3, 4}, {9, 8, 7, 6}};
};

TEST_F(GenerationSpeedTest, EverySequenceIsTheModelsOwnGreedyText) {
  int repetitions = 0;
  const auto speed = MeasureGeneration(model_, prompts_, 6, [&] { ++repetitions; });
  ASSERT_TRUE(speed.ok()) << speed.status();
  EXPECT_GE(repetitions, 1);
  EXPECT_GT(speed->tokens_per_second.value, 0);
  EXPECT_GT(speed->prompt_tokens_per_second.value, 0);
  EXPECT_EQ(speed->tokens_per_second.standard_error.has_value(), repetitions > 1);
  ASSERT_EQ(speed->ids.size(), 2u);
  for (size_t b = 0; b < 2; ++b) {
    std::vector<int32_t> expected = prompts_[b];
    for (int i = 0; i < 6; ++i) {
      const auto logits =
          testing::RunSlowReference(config_, source_->Matrices(), expected).logits.back();
      expected.push_back(
          static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
    }
    EXPECT_EQ(speed->ids[b], expected);
    EXPECT_TRUE(CheckGreedy(speed->ids[b], 4, LogitsOf(speed->ids[b]), 1e-5).ok());
  }
}

TEST_F(GenerationSpeedTest, AnotherTokenIsFound) {
  const auto speed = MeasureGeneration(model_, {prompts_[0]}, 6, nullptr);
  ASSERT_TRUE(speed.ok()) << speed.status();
  std::vector<int32_t> ids = speed->ids[0];
  ids[6] = ids[6] == 0 ? 1 : 0;
  const absl::Status status = CheckGreedy(ids, 4, LogitsOf(ids), 1e-5);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("token 3 behind the prompt"));
  // The prompt is nobody's choice.
  ids = speed->ids[0];
  EXPECT_TRUE(CheckGreedy(ids, 10, LogitsOf(ids), 1e-5).ok());
}

TEST(CheckGreedyTest, NearTiesCount) {
  Tensor logits = Tensor::Host(DType::kF32, {2, 3}).value();
  const float values[] = {0.0f, 10.0f, 9.95f, 0.0f, 0.0f, 0.0f};
  std::copy(values, values + 6, logits.as<float>());
  const std::vector<int32_t> second = {0, 2};
  EXPECT_TRUE(CheckGreedy(second, 1, logits, 0.006).ok());  // 0.05 of 10
  EXPECT_FALSE(CheckGreedy(second, 1, logits, 0.004).ok());
}

}  // namespace
}  // namespace quantmill
