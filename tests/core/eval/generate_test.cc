#include "core/eval/generate.h"

#include <algorithm>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "core/model/dense_source.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/core/model/random_model.h"
#include "tests/core/model/slow_reference.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using testing::MakeRandomModel;
using testing::MemorySource;
using ::testing::SizeIs;
using testing::SmallConfig;

class GenerateTest : public ::testing::Test {
 protected:
  explicit GenerateTest(nlohmann::ordered_json config = SmallConfig("llama"))
      : config_(std::move(config)),
        source_(MakeRandomModel(config_, 31)),
        model_(ResidentModel::Load(*backend_, *source_).value()) {}

  // Greedy continuation by running the slow reference over everything again for each token.
  std::vector<int32_t> SlowGreedy(std::vector<int32_t> ids, int64_t count) {
    const size_t prompt = ids.size();
    for (int64_t i = 0; i < count; ++i) {
      const auto logits =
          testing::RunSlowReference(config_, source_->Matrices(), ids).logits.back();
      ids.push_back(
          static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
    }
    return std::vector<int32_t>(ids.begin() + static_cast<int64_t>(prompt), ids.end());
  }

  nlohmann::ordered_json config_;
  std::unique_ptr<Backend> backend_ = MakeCpuBackend(2).value();
  std::unique_ptr<MemorySource> source_;
  ResidentModel model_;
};

TEST_F(GenerateTest, GreedyEqualsFullRecomputation) {
  GenerateOptions options;
  options.max_tokens = 12;
  options.stop_at_eos = false;
  std::vector<int32_t> streamed;
  options.on_token = [&](int32_t token) {
    streamed.push_back(token);
    return false;
  };
  const std::vector<int32_t> prompt = {1, 17, 40, 5};
  const GenerateResult result = Generate(model_, prompt, options).value();
  EXPECT_THAT(result.tokens, ElementsAreArray(SlowGreedy(prompt, 12)));
  EXPECT_EQ(streamed, result.tokens);
  EXPECT_GT(result.prompt_tokens_per_second, 0);
  EXPECT_GT(result.tokens_per_second, 0);
  EXPECT_FALSE(result.reached_end);
}

TEST_F(GenerateTest, StopsAtEndOfText) {
  const std::vector<int32_t> prompt = {1, 17, 40, 5};
  const std::vector<int32_t> free_run = SlowGreedy(prompt, 4);
  // A model whose end-of-text token is the third of those.
  config_["eos_token_id"] = {60, free_run[2]};
  const auto position = std::find(free_run.begin(), free_run.end(), free_run[2]);
  const MemorySource source(ParseModelConfig(nlohmann::ordered_json::parse(config_.dump())).value(),
                            source_->tensors());
  MemorySource copy = source;
  const ResidentModel model = ResidentModel::Load(*backend_, copy).value();
  GenerateOptions options;
  options.max_tokens = 12;
  const GenerateResult result = Generate(model, prompt, options).value();
  EXPECT_TRUE(result.reached_end);
  EXPECT_THAT(result.tokens, ElementsAreArray(free_run.begin(), position));
}

TEST_F(GenerateTest, StopsAtFurtherEndsOfText) {
  const std::vector<int32_t> prompt = {1, 17, 40, 5};
  const std::vector<int32_t> free_run = SlowGreedy(prompt, 1);
  GenerateOptions options;
  options.more_eos = {free_run[0]};
  const GenerateResult result = Generate(model_, prompt, options).value();
  EXPECT_TRUE(result.reached_end);
  EXPECT_THAT(result.tokens, SizeIs(0));
}

TEST_F(GenerateTest, CallbackCanStop) {
  GenerateOptions options;
  options.stop_at_eos = false;
  options.on_token = [](int32_t) { return true; };
  EXPECT_THAT(Generate(model_, {3}, options).value().tokens, SizeIs(1));
}

TEST_F(GenerateTest, EndsWhereTheModelsPositionsEnd) {
  GenerateOptions options;
  options.max_tokens = 1000;
  options.stop_at_eos = false;
  // 128 positions: the prompt takes 4, and the last token chosen needs none.
  EXPECT_THAT(Generate(model_, {1, 2, 3, 4}, options).value().tokens, SizeIs(128 - 4 + 1));
}

TEST_F(GenerateTest, SamplingDependsOnTheSeedAlone) {
  GenerateOptions options;
  options.max_tokens = 20;
  options.stop_at_eos = false;
  options.sampling.temperature = 1.0;
  options.sampling.top_p = 0.9;
  options.sampling.seed = 5;
  const std::vector<int32_t> first = Generate(model_, {1}, options).value().tokens;
  EXPECT_EQ(Generate(model_, {1}, options).value().tokens, first);
  options.sampling.seed = 6;
  EXPECT_NE(Generate(model_, {1}, options).value().tokens, first);
}

TEST_F(GenerateTest, ContinuesASession) {
  GenerateOptions options;
  options.max_tokens = 3;
  options.stop_at_eos = false;
  DecodeSession session = DecodeSession::Create(model_, 64).value();
  const std::vector<int32_t> first = Continue(model_, session, {1, 17}, options).value().tokens;
  EXPECT_EQ(session.length(), 4);
  const std::vector<int32_t> next =
      Continue(model_, session, {first.back(), 9}, options).value().tokens;
  std::vector<int32_t> all = {1, 17};
  all.insert(all.end(), first.begin(), first.end());
  all.push_back(9);
  EXPECT_THAT(next, ElementsAreArray(SlowGreedy(all, 3)));
}

TEST_F(GenerateTest, BadInput) {
  GenerateOptions options;
  const auto code = [&](std::vector<int32_t> prompt) {
    return Generate(model_, prompt, options).status();
  };
  EXPECT_TRUE(absl::IsInvalidArgument(code({})));
  EXPECT_TRUE(absl::IsInvalidArgument(code({64})));
  EXPECT_TRUE(absl::IsInvalidArgument(code({-1})));
  const absl::Status status = code(std::vector<int32_t>(129, 1));
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("129 tokens"));
  options.max_tokens = 0;
  EXPECT_TRUE(absl::IsInvalidArgument(code({1})));
  options = GenerateOptions();
  options.sampling.temperature = -0.5;
  EXPECT_TRUE(absl::IsInvalidArgument(code({1})));
  options = GenerateOptions();
  options.sampling.top_p = 0;
  EXPECT_TRUE(absl::IsInvalidArgument(code({1})));
  options.sampling.top_p = 1.5;
  EXPECT_TRUE(absl::IsInvalidArgument(code({1})));
}

TEST_F(GenerateTest, SessionLimits) {
  EXPECT_TRUE(absl::IsInvalidArgument(DecodeSession::Create(model_, 129).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(DecodeSession::Create(model_, 0).status()));
  DecodeSession session = DecodeSession::Create(model_, 3, 2).value();
  EXPECT_TRUE(absl::IsInvalidArgument(session.Append({1, 2, 3}).status()));
  ASSERT_TRUE(session.Append({1, 2, 3, 4}).ok());
  EXPECT_TRUE(absl::IsOutOfRange(session.Append({1, 2, 3, 4}).status()));
  EXPECT_TRUE(session.Append({1, 2}).ok());
}

TEST_F(GenerateTest, BatchOfSequencesEqualsEachAlone) {
  DecodeSession both = DecodeSession::Create(model_, 8, 2).value();
  DecodeSession first = DecodeSession::Create(model_, 8).value();
  DecodeSession second = DecodeSession::Create(model_, 8).value();
  const std::vector<std::vector<int32_t>> steps_a = {{4, 8, 15}, {16}, {23}};
  const std::vector<std::vector<int32_t>> steps_b = {{42, 1, 9}, {33}, {7}};
  for (size_t step = 0; step < steps_a.size(); ++step) {
    std::vector<int32_t> joined = steps_a[step];
    joined.insert(joined.end(), steps_b[step].begin(), steps_b[step].end());
    const Tensor logits = both.Append(joined).value();
    const Tensor a = first.Append(steps_a[step]).value();
    const Tensor b = second.Append(steps_b[step]).value();
    for (int64_t v = 0; v < 64; ++v) {
      EXPECT_NEAR(logits.as<float>()[v], a.as<float>()[v], 1e-4);
      EXPECT_NEAR(logits.as<float>()[64 + v], b.as<float>()[v], 1e-4);
    }
  }
}

// A prompt longer than one piece of the prompt's run.
class LongPromptTest : public GenerateTest {
 protected:
  LongPromptTest() : GenerateTest(SmallConfig("llama", {{"max_position_embeddings", 2048}})) {}
};

TEST_F(LongPromptTest, PiecesGiveTheSameLogits) {
  const std::vector<int32_t> ids = testing::RandomIds(700, 64, 4);
  DecodeSession whole = DecodeSession::Create(model_, 700).value();
  DecodeSession steps = DecodeSession::Create(model_, 700).value();
  const Tensor expected = whole.Append(ids).value();
  Tensor actual;
  for (size_t begin = 0; begin < ids.size(); begin += 70) {
    actual = steps.Append(absl::MakeConstSpan(ids).subspan(begin, 70)).value();
  }
  for (int64_t v = 0; v < 64; ++v) {
    EXPECT_NEAR(actual.as<float>()[v], expected.as<float>()[v], 1e-4);
  }
}

// So many sequences that their prompts run in pieces of two positions.
TEST_F(GenerateTest, PiecesOfABatchAreThoseOfEachSequence) {
  constexpr int64_t kBatch = 2000, kLength = 5;
  const std::vector<int32_t> ids = testing::RandomIds(kBatch * kLength, 64, 5);
  DecodeSession batch = DecodeSession::Create(model_, kLength, kBatch).value();
  const Tensor logits = batch.Append(ids).value();
  for (const int64_t sequence : {int64_t{0}, int64_t{1}, kBatch - 1}) {
    DecodeSession alone = DecodeSession::Create(model_, kLength).value();
    const Tensor expected =
        alone.Append(absl::MakeConstSpan(ids).subspan(static_cast<size_t>(sequence * kLength), 5))
            .value();
    for (int64_t v = 0; v < 64; ++v) {
      EXPECT_NEAR(logits.as<float>()[sequence * 64 + v], expected.as<float>()[v], 1e-4);
    }
  }
}

// ---- real models --------------------------------------------------------------------------------

class GreedyModel : public ::testing::TestWithParam<const char*> {};

TEST_P(GreedyModel, EqualsTheStoredContinuation) {
  QM_SHARED_OR_SKIP(directory, std::string("models/") + GetParam());
  std::ifstream file(directory + "/reference.json");
  const auto greedy = nlohmann::json::parse(file).at("greedy");
  const std::vector<int32_t> ids = greedy.at("ids");
  const auto backend = MakeCpuBackend().value();
  const auto source = DenseSource::Open(directory).value();
  const ResidentModel model = ResidentModel::Load(*backend, *source).value();
  // How many of the stored ids are the prompt is not stored: the continuation of the first nine
  // must be the rest.
  constexpr size_t kPrompt = 9;
  GenerateOptions options;
  options.max_tokens = static_cast<int64_t>(ids.size() - kPrompt);
  const GenerateResult result =
      Generate(model, absl::MakeConstSpan(ids).first(kPrompt), options).value();
  EXPECT_THAT(result.tokens, ElementsAreArray(ids.begin() + kPrompt, ids.end()));
}

INSTANTIATE_TEST_SUITE_P(All, GreedyModel, ::testing::Values("tiny-llama", "small-llama"),
                         [](const auto& info) {
                           return std::string(info.param).substr(0, 4) + "Llama";
                         });

}  // namespace
}  // namespace quantmill
