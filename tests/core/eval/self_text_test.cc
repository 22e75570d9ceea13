#include "core/eval/self_text.h"

#include <memory>
#include <set>

#include "core/eval/evaluate.h"
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

TEST(SelfTextTest, BadInput) {
  Rig rig;
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
