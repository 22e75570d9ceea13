#include "core/eval/evaluate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "core/eval/logits.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/core/model/compare.h"
#include "tests/core/model/random_model.h"
#include "tests/core/model/slow_reference.h"

namespace quantmill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::MakeRandomModel;
using testing::Matrix;
using testing::MemorySource;
using testing::SmallConfig;

constexpr int64_t kWindows = 4;
constexpr int64_t kLength = 10;
constexpr int64_t kVocab = 64;

Tensor Windows(uint64_t seed) {
  return Tensor::FromI32({kWindows, kLength}, testing::RandomIds(kWindows * kLength, kVocab, seed));
}

std::vector<double> LogSoftmax(const std::vector<double>& logits) {
  double total = 0;
  for (double value : logits) total += std::exp(value);
  std::vector<double> result;
  for (double value : logits) result.push_back(value - std::log(total));
  return result;
}

// Everything Evaluate reports, worked out from the slow reference's logits.
struct Expected {
  std::vector<double> window_nll, window_kl, window_agreement, window_ratio;
  std::vector<double> kl;
};

Expected SlowScores(const nlohmann::ordered_json& config, const MemorySource& model,
                    const MemorySource& reference, const Tensor& windows) {
  Expected expected;
  for (int64_t w = 0; w < kWindows; ++w) {
    const int32_t* begin = windows.as<int32_t>() + w * kLength;
    const std::vector<int32_t> ids(begin, begin + kLength);
    const Matrix q = testing::RunSlowReference(config, model.Matrices(), ids).logits;
    const Matrix p = testing::RunSlowReference(config, reference.Matrices(), ids).logits;
    double nll = 0, reference_nll = 0, kl = 0, agreement = 0;
    for (size_t t = 0; t + 1 < ids.size(); ++t) {
      const std::vector<double> log_q = LogSoftmax(q[t]), log_p = LogSoftmax(p[t]);
      nll -= log_q[static_cast<size_t>(ids[t + 1])];
      reference_nll -= log_p[static_cast<size_t>(ids[t + 1])];
      double divergence = 0;
      for (size_t v = 0; v < log_p.size(); ++v) {
        divergence += std::exp(log_p[v]) * (log_p[v] - log_q[v]);
      }
      kl += divergence;
      expected.kl.push_back(divergence);
      const auto top = [](const std::vector<double>& x) {
        return std::max_element(x.begin(), x.end()) - x.begin();
      };
      agreement += top(log_p) == top(log_q) ? 1 : 0;
    }
    const double positions = kLength - 1;
    expected.window_nll.push_back(nll / positions);
    expected.window_kl.push_back(kl / positions);
    expected.window_agreement.push_back(agreement / positions);
    expected.window_ratio.push_back((nll - reference_nll) / positions);
  }
  return expected;
}

double Mean(const std::vector<double>& values) {
  double sum = 0;
  for (double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

double StandardError(const std::vector<double>& values) {
  double squares = 0;
  for (double value : values) squares += (value - Mean(values)) * (value - Mean(values));
  const double n = static_cast<double>(values.size());
  return std::sqrt(squares / (n - 1)) / std::sqrt(n);
}

std::unique_ptr<MemorySource> Rounded(const MemorySource& model) {
  auto tensors = const_cast<MemorySource&>(model).tensors();
  for (auto& [name, tensor] : tensors) {
    if (tensor.rank() != 2 || !name.starts_with("model.layers")) continue;
    Tensor coarse = Tensor::Host(DType::kF32, tensor.shape()).value();
    for (int64_t i = 0; i < tensor.elements(); ++i) {
      coarse.as<float>()[i] = std::round(tensor.as<float>()[i] * 8.0f) / 8.0f;
    }
    tensor = coarse;
  }
  return std::make_unique<MemorySource>(model.config(), tensors);
}

class EvaluateTest : public ::testing::Test {
 protected:
  const nlohmann::ordered_json config_ = SmallConfig("llama");
  std::unique_ptr<Backend> backend_ = MakeCpuBackend(2).value();
  std::unique_ptr<MemorySource> original_ = MakeRandomModel(config_, 21);
  std::unique_ptr<MemorySource> rounded_ = Rounded(*original_);
  Tensor windows_ = Windows(5);
};

TEST_F(EvaluateTest, AgreesWithSlowReference) {
  const Expected expected = SlowScores(config_, *rounded_, *original_, windows_);
  // Logits are f32 sums over 32 to 64 terms through two blocks: good to about 1e-5.
  constexpr double kTolerance = 1e-4;
  for (int64_t batch_rows : {1, 25, 1000}) {
    EvalOptions options;
    options.stream.batch_rows = batch_rows;
    const auto result_or = Evaluate(*backend_, *rounded_, original_.get(), windows_, options);
    ASSERT_TRUE(result_or.ok()) << result_or.status();
    const EvalResult& result = *result_or;
    EXPECT_EQ(result.tokens, kWindows * (kLength - 1));
    EXPECT_EQ(result.context, kLength);
    EXPECT_EQ(result.windows, kWindows);
    EXPECT_GT(result.seconds, 0);
    EXPECT_NEAR(result.nll.value, Mean(expected.window_nll), kTolerance);
    EXPECT_NEAR(*result.nll.standard_error, StandardError(expected.window_nll), kTolerance);
    const double perplexity = std::exp(Mean(expected.window_nll));
    EXPECT_NEAR(result.perplexity.value, perplexity, kTolerance * perplexity);
    EXPECT_NEAR(*result.perplexity.standard_error, perplexity * StandardError(expected.window_nll),
                kTolerance * perplexity);
    ASSERT_TRUE(result.comparison.has_value());
    const EvalResult::Comparison& comparison = *result.comparison;
    EXPECT_NEAR(comparison.kl_mean.value, Mean(expected.window_kl), kTolerance);
    EXPECT_NEAR(*comparison.kl_mean.standard_error, StandardError(expected.window_kl), kTolerance);
    EXPECT_NEAR(comparison.top1_agreement.value, Mean(expected.window_agreement), 1e-12);
    EXPECT_NEAR(comparison.ppl_ratio.value, std::exp(Mean(expected.window_ratio)), kTolerance);
    std::vector<double> sorted = expected.kl;
    std::sort(sorted.begin(), sorted.end());
    // 36 positions: the 18th and the 36th smallest.
    EXPECT_NEAR(comparison.kl_median, sorted[17], kTolerance);
    EXPECT_NEAR(comparison.kl_p99, sorted[35], kTolerance);
    EXPECT_GT(comparison.kl_mean.value, 100 * kTolerance) << "a test that shows nothing";
  }
}

// Of window w the tokens from 3 + w on; the means are over positions, not over windows.
TEST_F(EvaluateTest, ScoresWhatIsNamed) {
  std::vector<int32_t> scored(kWindows * kLength, 1);
  std::vector<double> nll(kWindows, 0), kl(kWindows, 0), count(kWindows, 0);
  for (int64_t w = 0; w < kWindows; ++w) {
    const int32_t* begin = windows_.as<int32_t>() + w * kLength;
    const std::vector<int32_t> ids(begin, begin + kLength);
    const Matrix q = testing::RunSlowReference(config_, rounded_->Matrices(), ids).logits;
    const Matrix p = testing::RunSlowReference(config_, original_->Matrices(), ids).logits;
    for (int64_t i = 0; i < kLength; ++i) {
      if (i < 3 + w) {
        scored[static_cast<size_t>(w * kLength + i)] = 0;
        continue;
      }
      const auto row = static_cast<size_t>(i - 1), at = static_cast<size_t>(w);
      const std::vector<double> log_q = LogSoftmax(q[row]), log_p = LogSoftmax(p[row]);
      nll[at] -= log_q[static_cast<size_t>(ids[static_cast<size_t>(i)])];
      for (size_t v = 0; v < log_p.size(); ++v) {
        kl[at] += std::exp(log_p[v]) * (log_p[v] - log_q[v]);
      }
      ++count[at];
    }
  }
  const Tensor named = Tensor::FromI32({kWindows, kLength}, scored);
  EvalOptions options;
  options.scored = &named;
  const EvalResult result =
      Evaluate(*backend_, *rounded_, original_.get(), windows_, options).value();
  const double positions = kWindows * Mean(count);
  EXPECT_EQ(static_cast<double>(result.tokens), positions);
  const double mean = kWindows * Mean(nll) / positions;
  EXPECT_NEAR(result.nll.value, mean, 1e-4);
  double squares = 0;
  for (size_t w = 0; w < kWindows; ++w) squares += std::pow(nll[w] - mean * count[w], 2);
  EXPECT_NEAR(*result.nll.standard_error,
              std::sqrt(squares * kWindows / (kWindows - 1)) / positions, 1e-4);
  EXPECT_NEAR(result.comparison->kl_mean.value, kWindows * Mean(kl) / positions, 1e-4);
}

TEST_F(EvaluateTest, WindowsWithNothingToScoreAreRefused) {
  std::vector<int32_t> scored(kWindows * kLength, 1);
  std::fill(scored.begin() + kLength + 1, scored.begin() + 2 * kLength, 0);
  const Tensor nothing = Tensor::FromI32({kWindows, kLength}, scored);
  EvalOptions options;
  options.scored = &nothing;
  EXPECT_THAT(
      std::string(Evaluate(*backend_, *original_, nullptr, windows_, options).status().message()),
      HasSubstr("no token of window 1"));
  const Tensor short_rows = nothing.Rows(0, 2);
  options.scored = &short_rows;
  EXPECT_TRUE(absl::IsInvalidArgument(
      Evaluate(*backend_, *original_, nullptr, windows_, options).status()));
}

TEST_F(EvaluateTest, AModelAgainstItself) {
  const EvalResult result = Evaluate(*backend_, *original_, original_.get(), windows_, {}).value();
  EXPECT_EQ(result.comparison->kl_mean.value, 0.0);
  EXPECT_EQ(result.comparison->kl_p99, 0.0);
  EXPECT_EQ(result.comparison->top1_agreement.value, 1.0);
  EXPECT_EQ(result.comparison->ppl_ratio.value, 1.0);
}

TEST_F(EvaluateTest, ReleasesEveryBlockAfterUse) {
  ASSERT_TRUE(Evaluate(*backend_, *original_, nullptr, windows_, {}).ok());
  EXPECT_THAT(original_->released(), ElementsAre(0, 1));
}

TEST_F(EvaluateTest, SingleWindowHasNoStandardError) {
  const EvalResult result =
      Evaluate(*backend_, *original_, nullptr, windows_.Rows(0, 1), {}).value();
  EXPECT_FALSE(result.nll.standard_error.has_value());
  EXPECT_FALSE(ToJson(result).contains("nll_stderr"));
  EXPECT_FALSE(result.comparison.has_value());
}

TEST_F(EvaluateTest, JsonKeys) {
  const auto keys = [](const nlohmann::ordered_json& json) {
    std::vector<std::string> names;
    for (const auto& [key, value] : json.items()) {
      EXPECT_TRUE(value.is_number()) << key;
      names.push_back(key);
    }
    return names;
  };
  const EvalResult alone = Evaluate(*backend_, *rounded_, nullptr, windows_, {}).value();
  EXPECT_THAT(keys(ToJson(alone)),
              ElementsAre("perplexity", "perplexity_stderr", "nll", "nll_stderr", "tokens",
                          "context", "windows", "seconds", "tokens_per_second"));
  const EvalResult both = Evaluate(*backend_, *rounded_, original_.get(), windows_, {}).value();
  EXPECT_THAT(keys(ToJson(both)),
              ElementsAre("perplexity", "perplexity_stderr", "nll", "nll_stderr", "tokens",
                          "context", "windows", "seconds", "tokens_per_second", "kl_mean",
                          "kl_mean_stderr", "kl_median", "kl_p99", "top1_agreement",
                          "top1_agreement_stderr", "ppl_ratio", "ppl_ratio_stderr"));
}

TEST_F(EvaluateTest, ProgressTellsStagesAndCanStop) {
  std::vector<std::string> seen;
  EvalOptions options;
  options.progress = [&](std::string_view stage, int64_t done, int64_t total) {
    seen.push_back(std::string(stage) + " " + std::to_string(done) + "/" + std::to_string(total));
    return absl::OkStatus();
  };
  ASSERT_TRUE(Evaluate(*backend_, *rounded_, original_.get(), windows_, options).ok());
  EXPECT_THAT(seen, ElementsAre("model 1/2", "model 2/2", "reference 1/2", "reference 2/2",
                                "score 1/4", "score 2/4", "score 3/4", "score 4/4"));
  options.progress = [](std::string_view, int64_t, int64_t) {
    return absl::CancelledError("interrupted");
  };
  EXPECT_TRUE(
      absl::IsCancelled(Evaluate(*backend_, *rounded_, nullptr, windows_, options).status()));
}

TEST_F(EvaluateTest, OutputThatIsNotFinite) {
  original_->tensors().at("model.norm.weight").as<float>()[3] =
      std::numeric_limits<float>::quiet_NaN();
  const absl::Status status = Evaluate(*backend_, *original_, nullptr, windows_, {}).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("window 0 is not finite"));
}

TEST_F(EvaluateTest, WindowsThatCannotBeScored) {
  EXPECT_TRUE(absl::IsInvalidArgument(
      Evaluate(*backend_, *original_, nullptr, Tensor::FromI32({3, 1}, {1, 2, 3}), {}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      Evaluate(*backend_, *original_, nullptr, Tensor::FromI32({1, 2}, {1, 99}), {}).status()));
}

TEST_F(EvaluateTest, ReferenceWithAnotherVocabulary) {
  const auto other = MakeRandomModel(SmallConfig("llama", {{"vocab_size", 65}}), 1);
  const absl::Status status = Evaluate(*backend_, *original_, other.get(), windows_, {}).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("64 and 65 tokens"));
}

TEST(EstimateTest, KnownValues) {
  const Estimate estimate = EstimateFromWindows({1.0, 2.0, 3.0, 6.0});
  EXPECT_DOUBLE_EQ(estimate.value, 3.0);
  // Sample variance 14/3, over 4 windows.
  EXPECT_DOUBLE_EQ(*estimate.standard_error, std::sqrt(14.0 / 3.0 / 4.0));
}

// ---- logits in tiles ----------------------------------------------------------------------------

TEST(TileTest, SeveralTilesGiveWhatOneWould) {
  // A tile holds 512 rows of this vocabulary; the second one is short.
  constexpr int64_t kTokens = 520, kLargeVocab = 1 << 15;
  const nlohmann::ordered_json config =
      SmallConfig("llama", {{"vocab_size", kLargeVocab}, {"max_position_embeddings", kTokens}});
  const auto original = MakeRandomModel(config, 5);
  const auto rounded = Rounded(*original);
  const auto backend = MakeCpuBackend(2).value();
  const Tensor ids =
      Tensor::FromI32({1, kTokens}, testing::RandomIds(kTokens, static_cast<int>(kLargeVocab), 6));
  const auto whole = [&](MemorySource& model) {
    const WindowStates states = RunWindows(*backend, model, ids, StreamOptions{}).value();
    const OutputHead head = OutputHead::Load(*backend, model).value();
    EXPECT_LT(head.TileRows(), kTokens - 1) << "a test that shows nothing";
    return head.Logits(*backend, states.Load(*backend, {0, 1}).value()).value();
  };
  const Tensor q = whole(*rounded), p = whole(*original);

  const Tensor logits = ComputeLogits(*backend, *rounded, ids).value();
  double nll = 0, kl = 0;
  for (int64_t t = 0; t < kTokens; ++t) {
    const auto row = [t](const Tensor& tensor) {
      const float* begin = tensor.as<float>() + t * kLargeVocab;
      return std::vector<double>(begin, begin + kLargeVocab);
    };
    const std::vector<double> log_q = LogSoftmax(row(q)), log_p = LogSoftmax(row(p));
    for (int64_t v = 0; v < kLargeVocab; ++v) {
      ASSERT_NEAR(logits.as<float>()[t * kLargeVocab + v], q.as<float>()[t * kLargeVocab + v], 1e-5)
          << "position " << t;
      if (t + 1 < kTokens) kl += std::exp(log_p[v]) * (log_p[v] - log_q[v]);
    }
    if (t + 1 < kTokens) nll -= log_q[static_cast<size_t>(ids.as<int32_t>()[t + 1])];
  }
  const EvalResult result = Evaluate(*backend, *rounded, original.get(), ids, {}).value();
  EXPECT_NEAR(result.nll.value, nll / (kTokens - 1), 1e-5);
  EXPECT_NEAR(result.comparison->kl_mean.value, kl / (kTokens - 1), 1e-5);
  EXPECT_GT(result.comparison->kl_mean.value, 1e-2) << "a test that shows nothing";
}

// ---- logits of given ids ------------------------------------------------------------------------

TEST(LogitsTest, AgreeWithSlowReference) {
  const nlohmann::ordered_json config = SmallConfig("qwen3");
  const auto model = MakeRandomModel(config, 3);
  const auto backend = MakeCpuBackend(2).value();
  const std::vector<int32_t> ids = testing::RandomIds(9, kVocab, 2);
  const Tensor logits = ComputeLogits(*backend, *model, Tensor::FromI32({1, 9}, ids)).value();
  const Matrix expected = testing::RunSlowReference(config, model->Matrices(), ids).logits;
  testing::ExpectNear(logits, expected, testing::FloatTolerance(64, 26, testing::MaxAbs(expected)));
}

TEST(LogitsTest, OnlyOneSequence) {
  const auto model = MakeRandomModel(SmallConfig("llama"), 3);
  const auto backend = MakeCpuBackend(1).value();
  EXPECT_TRUE(absl::IsInvalidArgument(
      ComputeLogits(*backend, *model, Tensor::FromI32({2, 2}, {1, 2, 3, 4})).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      ComputeLogits(*backend, *model, Tensor::FromI32({2}, {1, 2})).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      ComputeLogits(*backend, *model, Tensor::FromI32({1, 0}, {})).status()));
}

}  // namespace
}  // namespace quantmill
