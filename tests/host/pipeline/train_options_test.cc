// The `train` section: defaults, lengths, and what is refused. Where errors point to:
// tests/pipeline/train_*.yaml.
#include "host/pipeline/train_options.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "host/pipeline/check.h"
#include "tests/host/pipeline/fixture.h"

namespace quantmill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Json = nlohmann::json;

struct Outcome {
  TrainOptions options;
  std::vector<std::string> errors;
};

// data and 128 tokens a step are given; `changes` is merged over that.
Outcome Read(const Json& changes) {
  Json section = {{"data", "/t"}, {"batch", 2}, {"sequence_length", 64}};
  section.update(changes);
  Outcome outcome;
  outcome.options = ReadTrainOptions(section, &outcome.errors);
  return outcome;
}

TEST(TrainOptionsTest, Defaults) {
  std::vector<std::string> errors;
  const TrainOptions o = ReadTrainOptions({{"data", "/t"}, {"steps", 100}}, &errors);
  EXPECT_THAT(errors, IsEmpty());
  EXPECT_EQ(o.data, "/t");
  EXPECT_EQ(o.key, "text");
  EXPECT_EQ(o.batch, 32);
  EXPECT_EQ(o.MicroBatch(), 32);
  EXPECT_EQ(o.sequence_length, 1024);
  EXPECT_EQ(o.tokens, 100 * 32 * 1024);
  EXPECT_EQ(o.Steps(), 100);
  EXPECT_EQ(o.rate, 1e-4);
  EXPECT_EQ(o.parameter_rate, 1);
  EXPECT_TRUE(o.distill);
  EXPECT_EQ(o.warmup, 3);  // 0.03 of the steps
  EXPECT_EQ(o.rate_floor, 0.05);
  EXPECT_EQ(o.decay, 0);
  EXPECT_EQ(o.clip_norm, 1);
  EXPECT_TRUE(o.norms);
  EXPECT_TRUE(o.checkpointing);
  EXPECT_EQ(o.block_tokens, o.tokens / 8);
  EXPECT_EQ(o.block_batch, 4);
  EXPECT_EQ(o.BlockSteps(), 100);
  EXPECT_EQ(o.block_rate, o.rate);
  EXPECT_EQ(o.save_seconds, 60);
}

TEST(TrainOptionsTest, TokensAreRoundedUpToSteps) {
  EXPECT_EQ(Read({{"tokens", 128}}).options.Steps(), 1);
  EXPECT_EQ(Read({{"tokens", 129}}).options.Steps(), 2);
  EXPECT_EQ(Read({{"tokens", 129}}).options.tokens, 256);
  EXPECT_EQ(Read({{"tokens", 1e6}}).options.Steps(), 7813);
  EXPECT_EQ(Read({{"tokens", 0}}).options.Steps(), 0);
  EXPECT_THAT(Read({{"steps", 0}}).errors, IsEmpty());
}

TEST(TrainOptionsTest, WarmupIsAShareOrSteps) {
  EXPECT_EQ(Read({{"steps", 40}, {"warmup", 0.25}}).options.warmup, 10);
  EXPECT_EQ(Read({{"steps", 40}, {"warmup", 1}}).options.warmup, 1);
  EXPECT_EQ(Read({{"steps", 40}, {"warmup", 40}}).options.warmup, 40);
  EXPECT_EQ(Read({{"steps", 40}, {"warmup", 0}}).options.warmup, 0);
  EXPECT_THAT(Read({{"steps", 40}, {"warmup", 41}}).errors,
              ElementsAre("'train.warmup' is 41 steps; the training has only 40"));
}

TEST(TrainOptionsTest, ValuesAreTaken) {
  const Outcome outcome = Read({{"steps", 8},
                                {"key", "body"},
                                {"micro_batch", 1},
                                {"lr", 1e-3},
                                {"lr_scale", 10},
                                {"lr_floor", 0},
                                {"weight_decay", 0.1},
                                {"clip_norm", 0},
                                {"beta1", 0.98},
                                {"average", 0.5},
                                {"loss", "lm"},
                                {"norms", false},
                                {"checkpointing", false},
                                {"block_tokens", 640},
                                {"block_batch", 2},
                                {"block_lr", 0.5},
                                {"save_seconds", 0}});
  EXPECT_THAT(outcome.errors, IsEmpty());
  const TrainOptions& o = outcome.options;
  EXPECT_EQ(o.key, "body");
  EXPECT_EQ(o.MicroBatch(), 1);
  EXPECT_EQ(o.rate, 1e-3);
  EXPECT_EQ(o.parameter_rate, 10);
  EXPECT_EQ(o.rate_floor, 0);
  EXPECT_EQ(o.decay, 0.1);
  EXPECT_EQ(o.clip_norm, 0);
  EXPECT_EQ(o.beta1, 0.98);
  EXPECT_EQ(o.AverageSteps(), 4);
  EXPECT_FALSE(o.distill);
  EXPECT_FALSE(o.norms);
  EXPECT_FALSE(o.checkpointing);
  EXPECT_EQ(o.BlockSteps(), 5);
  EXPECT_EQ(o.block_rate, 0.5);
  EXPECT_EQ(o.save_seconds, 0);
  // Without a rate of its own the phase has that of the whole.
  EXPECT_EQ(Read({{"steps", 8}, {"lr", 1e-3}}).options.block_rate, 1e-3);
}

TEST(TrainOptionsTest, SampledTextIsWindows) {
  const TrainOptions none = Read({{"steps", 8}}).options;
  EXPECT_EQ(none.SampledWindows(), 0);
  const Outcome some = Read({{"steps", 8}, {"sequence_length", 1024}, {"sampled_tokens", 1025}});
  EXPECT_THAT(some.errors, IsEmpty());
  EXPECT_EQ(some.options.SampledWindows(), 2);
  EXPECT_EQ(some.options.GivenTokens(), 128);
  EXPECT_EQ(Read({{"steps", 8}, {"sequence_length", 4}}).options.GivenTokens(), 1);
  EXPECT_THAT(Read({{"steps", 8}, {"sampled_tokens", 64}, {"loss", "lm"}}).errors,
              ElementsAre("'train.sampled_tokens' needs loss: distill; next tokens that the model "
                          "wrote itself teach it nothing"));
}

TEST(TrainOptionsTest, WrongValues) {
  const std::pair<Json, std::string> cases[] = {
      {{{"data", 5}}, "'train.data' is 5; it must be a text"},
      {{{"key", true}}, "'train.key' is true; it must be a text"},
      {{{"batch", 0}}, "'train.batch' is 0; it must be a whole number, 1 or more"},
      {{{"batch", 1.5}}, "'train.batch' is 1.5; it must be a whole number, 1 or more"},
      {{{"batch", "2"}}, "'train.batch' is \"2\"; it must be a whole number, 1 or more"},
      {{{"batch", 1e300}}, "'train.batch' is 1e+300; it must be a whole number, 1 or more"},
      {{{"batch", 1e15}}, "'train.batch' is 1e+15; it must be smaller"},
      {{{"micro_batch", -1}}, "'train.micro_batch' is -1; it must be a whole number, 0 or more"},
      {{{"micro_batch", 3}}, "'train.micro_batch' is 3; it must divide batch, which is 2"},
      {{{"micro_batch", 4}}, "'train.micro_batch' is 4; it must divide batch, which is 2"},
      {{{"sequence_length", 1}},
       "'train.sequence_length' is 1; it must be a whole number, 2 or more"},
      {{{"steps", -1}}, "'train.steps' is -1; it must be a whole number, 0 or more"},
      {{{"steps", 1e15}}, "'train.steps' is 1e+15; it must be smaller"},
      {{{"steps", nullptr}}, "'train.steps' is null; it must be a whole number, 0 or more"},
      {{{"lr", -1}}, "'train.lr' is -1; it must be a number from 0 to 1"},
      {{{"lr", 1.5}}, "'train.lr' is 1.5; it must be a number from 0 to 1"},
      {{{"lr_scale", "big"}}, "'train.lr_scale' is \"big\"; it must be a number, 0 or more"},
      {{{"lr_floor", 2}}, "'train.lr_floor' is 2; it must be a number from 0 to 1"},
      {{{"weight_decay", -0.5}}, "'train.weight_decay' is -0.5; it must be a number, 0 or more"},
      {{{"clip_norm", -1}}, "'train.clip_norm' is -1; it must be a number, 0 or more"},
      {{{"beta1", 1}}, "'train.beta1' is 1; it must be a number from 0 to 0.9999"},
      {{{"sampled_tokens", -1}},
       "'train.sampled_tokens' is -1; it must be a whole number, 0 or more"},
      {{{"average", 2}}, "'train.average' is 2; it must be a number from 0 to 1"},
      {{{"warmup", -0.5}}, "'train.warmup' is -0.5; it must be a number from 0 to 1e+09"},
      {{{"loss", "mse"}}, "'train.loss' is \"mse\"; it must be distill or lm"},
      {{{"norms", "yes"}}, "'train.norms' is \"yes\"; it must be true or false"},
      {{{"embeddings", "no"}}, "'train.embeddings' is \"no\"; it must be true or false"},
      {{{"checkpointing", 0}}, "'train.checkpointing' is 0; it must be true or false"},
      {{{"block_tokens", -1}}, "'train.block_tokens' is -1; it must be a whole number, 0 or more"},
      {{{"block_batch", 0}}, "'train.block_batch' is 0; it must be a whole number, 1 or more"},
      {{{"block_lr", 2}}, "'train.block_lr' is 2; it must be a number from 0 to 1"},
      {{{"save_seconds", -1}}, "'train.save_seconds' is -1; it must be a number, 0 or more"},
  };
  for (const auto& [changes, text] : cases) {
    Json section = {{"steps", 8}};
    section.update(changes);
    EXPECT_THAT(Read(section).errors, ElementsAre(text)) << changes;
  }
}

TEST(TrainOptionsTest, EitherStepsOrTokens) {
  EXPECT_THAT(Read(Json::object()).errors,
              ElementsAre("'train' does not say how long; add tokens: N (or steps: N)"));
  EXPECT_THAT(Read({{"steps", 3}, {"tokens", 384}}).errors,
              ElementsAre("'train' has both 'steps' and 'tokens'; keep one"));
}

TEST(TrainOptionsTest, NoText) {
  for (const Json& section : {Json(), Json::object(), Json({{"steps", 3}}), Json("a text")}) {
    std::vector<std::string> errors;
    ReadTrainOptions(section, &errors);
    EXPECT_THAT(errors, ElementsAre("training needs text; add train: {data: FILE, tokens: N}"))
        << section;
  }
}

TEST(TrainOptionsTest, EveryErrorIsNamed) {
  EXPECT_THAT(Read({{"lr", "x"}, {"loss", 1}}).errors,
              ElementsAre("'train' does not say how long; add tokens: N (or steps: N)",
                          "'train.lr' is \"x\"; it must be a number from 0 to 1",
                          "'train.loss' is 1; it must be a text"));
}

TEST(CheckTrainingTest, MixturesOfExpertsAreRefused) {
  const auto pipeline = ParsePipelineText(
      "version: 1\nmodel: {path: m}\nstages:\n"
      "  - {use: qat, options: {init: x}, train: {data: t, steps: 1}}\n"
      "export: {format: dense, path: o}\n",
      "/p.yaml");
  ASSERT_TRUE(pipeline.ok()) << pipeline.status();
  ModelConfig model = testing::FakeModel();
  model.experts = 4;
  model.experts_per_token = 2;
  model.moe_layer = {true, true};
  const auto plan = CheckPipeline(*pipeline, testing::FakeCatalog(), model);
  ASSERT_FALSE(plan.ok());
  EXPECT_THAT(
      std::string(plan.status().message()),
      HasSubstr("/p.yaml:4:5: stage 'qat' cannot train this model: mixtures of experts have "
                "no gradients yet; use a model with dense MLPs"));
}

}  // namespace
}  // namespace quantmill
