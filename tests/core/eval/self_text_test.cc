#include "core/eval/self_text.h"

#include <cmath>
#include <memory>
#include <set>

#include "core/eval/evaluate.h"
#include "core/eval/sampler.h"
#include "core/model/dense_source.h"
#include "gtest/gtest.h"
#include "tests/core/model/random_model.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using testing::MakeRandomModel;
using testing::SmallConfig;

struct Rig {
  explicit Rig(const nlohmann::ordered_json& changes = {})
      : source(MakeRandomModel(SmallConfig("llama", changes), 41)),
        model(ResidentModel::Load(*backend, *source).value()) {}
  std::unique_ptr<Backend> backend = MakeCpuBackend(2).value();
  std::unique_ptr<WeightSource> source;
  ResidentModel model;
};

TEST(SelfTextTest, WindowsOfPlainTokens) {
  Rig rig;
  const Tensor windows = SampleSelfText(rig.model, 40, 16, 7).value();
  ASSERT_EQ(windows.shape(), Shape({40, 16}));
  std::set<int32_t> seen;
  for (int64_t i = 0; i < 40; ++i) {
    EXPECT_EQ(windows.as<int32_t>()[i * 16], 1);  // beginning of text
    for (int64_t j = 1; j < 16; ++j) {
      const int32_t id = windows.as<int32_t>()[i * 16 + j];
      ASSERT_TRUE(id >= 0 && id < 64 && id != 1 && id != 2) << id;
      seen.insert(id);
    }
  }
  EXPECT_GT(seen.size(), 20u);
}

TEST(SelfTextTest, SameSeedSameText) {
  Rig rig;
  const Tensor a = SampleSelfText(rig.model, 4, 12, 7).value();
  const Tensor b = SampleSelfText(rig.model, 4, 12, 7).value();
  const Tensor c = SampleSelfText(rig.model, 4, 12, 8).value();
  int same = 0;
  for (int64_t i = 0; i < a.elements(); ++i) {
    ASSERT_EQ(a.as<int32_t>()[i], b.as<int32_t>()[i]);
    same += a.as<int32_t>()[i] == c.as<int32_t>()[i] ? 1 : 0;
  }
  EXPECT_LT(same, 24);
}

TEST(SelfTextTest, WithoutBeginningOfTextTheFirstTokenIsDrawn) {
  Rig rig(nlohmann::ordered_json{{"bos_token_id", nullptr}});
  const Tensor windows = SampleSelfText(rig.model, 20, 2, 3).value();
  std::set<int32_t> first;
  for (int64_t i = 0; i < 20; ++i) first.insert(windows.as<int32_t>()[2 * i]);
  EXPECT_GT(first.size(), 5u);
}

// Each next token as a sampler of the window's own draws it from the logits of the whole text so
// far, computed at once.
TEST(SelfTextTest, ContinuesWhatItIsGiven) {
  Rig rig;
  constexpr int64_t kSamples = 3, kGiven = 5, kLength = 9;
  const Tensor given =
      Tensor::FromI32({kSamples, kGiven}, {5, 9, 13, 17, 21, 30, 31, 32, 33, 34, 7, 60, 3, 44, 8});
  const Tensor windows = ContinueText(rig.model, given, kLength, 11).value();
  ASSERT_EQ(windows.shape(), Shape({kSamples, kLength}));
  for (int64_t i = 0; i < kSamples; ++i) {
    const int32_t* window = windows.as<const int32_t>() + i * kLength;
    for (int64_t k = 0; k < kGiven; ++k) {
      EXPECT_EQ(window[k], given.as<const int32_t>()[i * kGiven + k]);
    }
    SamplingOptions options;
    options.temperature = 1;
    Sampler sampler(options, SplitMix64(StreamOf(11, static_cast<uint64_t>(i)).Next()));
    for (int64_t k = kGiven; k < kLength; ++k) {
      DecodeSession session = DecodeSession::Create(rig.model, kLength).value();
      Tensor logits = session.Append({window, static_cast<size_t>(k)}).value();
      for (const int special : {1, 2}) logits.as<float>()[special] = -INFINITY;
      EXPECT_EQ(window[k], sampler.Next({logits.as<float>(), 64})) << i << " " << k;
    }
  }
  // Nothing is left to write.
  const Tensor whole = ContinueText(rig.model, given, kGiven, 11).value();
  for (int64_t k = 0; k < given.elements(); ++k) {
    EXPECT_EQ(whole.as<const int32_t>()[k], given.as<const int32_t>()[k]);
  }
}

TEST(SelfTextTest, WindowsAtOnceDependOnWhatTheyTake) {
  ModelConfig config;
  config.layers = 10;
  config.kv_heads = 2;
  config.head_dim = 64;
  config.vocab_size = 8192;
  // A sequence has 2 x 10 x 128 x 1024 keys and values.
  EXPECT_EQ(WindowsAtOnce(config, 1024, {DType::kBF16}), (1 << 30) / (2 * 10 * 128 * 1024 * 2));
  EXPECT_EQ(WindowsAtOnce(config, 1024, {}), (1 << 30) / (2 * 10 * 128 * 1024 * 4));
  EXPECT_EQ(WindowsAtOnce(config, 1, {}), (64 << 20) / (8192 * 4));
  const DrawingDevice gpu = {DType::kBF16, true};
  EXPECT_EQ(WindowsAtOnce(config, 1024, gpu), (int64_t{4} << 30) / (2 * 10 * 128 * 1024 * 2));
  EXPECT_EQ(WindowsAtOnce(config, 1, gpu), (256 << 20) / (8192 * 4));
  EXPECT_EQ(DrawingBytes(config, 3, 1024, {}), 3 * (2 * 10 * 128 * 1024 * 4 + 8192 * 4));
  EXPECT_EQ(DrawingBytes(config, 1000000, 1, {}),
            (64 << 20) / (8192 * 4) * (2 * 10 * 128 * 4 + 8192 * 4));
  config.layers = 80;
  config.kv_heads = 8;
  EXPECT_EQ(WindowsAtOnce(config, 4096, {}), 32);
}

TEST(SelfTextTest, BadInput) {
  Rig rig;
  const Tensor ids = Tensor::FromI32({1, 4}, {3, 4, 5, 6});
  EXPECT_TRUE(absl::IsInvalidArgument(ContinueText(rig.model, ids, 3, 1).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(ContinueText(rig.model, ids.Reshaped({4}), 8, 1).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      ContinueText(rig.model, Tensor::FromF32({1, 1}, {3}), 8, 1).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      ContinueText(rig.model, Tensor::FromI32({1, 1}, {64}), 8, 1).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(SampleSelfText(rig.model, 0, 8, 1).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(SampleSelfText(rig.model, 1, 0, 1).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(SampleSelfText(rig.model, 1, 129, 1).status()));
}

// What a model samples at temperature 1 is as likely to it as its entropy says: far more likely
// than chance, and near the perplexity it has on real text.
TEST(SelfTextTest, TextIsLikelyToTheModel) {
  QM_SHARED_OR_SKIP(directory, "models/tiny-llama");
  const auto backend = MakeCpuBackend().value();
  const auto source = DenseSource::Open(directory).value();
  const ResidentModel model = ResidentModel::Load(*backend, *source).value();
  const Tensor windows = SampleSelfText(model, 8, 64, 1).value();
  const EvalResult result = Evaluate(*backend, *source, nullptr, windows, {}).value();
  EXPECT_LT(result.perplexity.value, 100);
  EXPECT_GT(result.perplexity.value, 5);
}

}  // namespace
}  // namespace quantmill
