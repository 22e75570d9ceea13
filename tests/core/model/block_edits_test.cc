#include "core/model/block_edits.h"

#include <cmath>
#include <memory>
#include <ostream>

#include "core/model/decoder.h"
#include "core/model/graph.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/core/model/compare.h"
#include "tests/core/model/random_model.h"

namespace quantmill {
namespace {

using ::nlohmann::ordered_json;
using ::testing::ElementsAre;
using testing::FloatTolerance;
using ::testing::HasSubstr;
using testing::MakeRandomModel;
using testing::MemorySource;
using testing::SmallConfig;

// Deterministic values in [-1, 1).
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed * 2 + 1) {}
  float Next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<double>(state_ >> 11) * 0x1p-52 - 1.0);
  }
  // Magnitude from 1/8 to 8, either sign.
  float Scale() {
    const float sign = Next() < 0 ? -1.0f : 1.0f;
    return sign * std::exp2(3.0f * Next());
  }

 private:
  uint64_t state_;
};

Tensor RandomScale(int64_t channels, uint64_t seed) {
  Numbers numbers(seed);
  Tensor scale = Tensor::Host(DType::kF32, {channels}).value();
  for (int64_t c = 0; c < channels; ++c) scale.as<float>()[c] = numbers.Scale();
  return scale;
}

// Block-diagonal, one orthogonal matrix per head: Gram-Schmidt over random rows.
Tensor RandomRotation(int64_t channels, int64_t width, uint64_t seed) {
  Numbers numbers(seed);
  Tensor q = Tensor::HostZeros(DType::kF32, {channels, channels}).value();
  for (int64_t first = 0; first < channels; first += width) {
    std::vector<std::vector<double>> rows;
    for (int64_t i = 0; i < width; ++i) {
      std::vector<double> row(static_cast<size_t>(width));
      for (double& value : row) value = numbers.Next();
      for (int pass = 0; pass < 2; ++pass) {
        for (const auto& other : rows) {
          double dot = 0;
          for (size_t k = 0; k < row.size(); ++k) dot += row[k] * other[k];
          for (size_t k = 0; k < row.size(); ++k) row[k] -= dot * other[k];
        }
      }
      double norm = 0;
      for (double value : row) norm += value * value;
      for (double& value : row) value /= std::sqrt(norm);
      for (int64_t k = 0; k < width; ++k) {
        q.as<float>()[(first + i) * channels + first + k] =
            static_cast<float>(row[static_cast<size_t>(k)]);
      }
      rows.push_back(std::move(row));
    }
  }
  return q;
}

struct Case {
  std::string name;
  ordered_json config;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

std::vector<Case> Cases() {
  const ordered_json experts = {{"num_experts", 6},
                                {"num_experts_per_tok", 2},
                                {"moe_intermediate_size", 24},
                                {"decoder_sparse_step", 1},
                                {"mlp_only_layers", ordered_json::array({0})},
                                {"norm_topk_prob", true}};
  return {
      {"Llama", SmallConfig("llama")},
      {"LlamaOneKeyPerQuery", SmallConfig("llama", {{"num_key_value_heads", 4}})},
      {"LlamaBiases", SmallConfig("llama", {{"attention_bias", true}, {"mlp_bias", true}})},
      {"MistralSlidingWindow", SmallConfig("mistral", {{"sliding_window", 5}})},
      {"Qwen2", SmallConfig("qwen2", {{"head_dim", 8}, {"use_sliding_window", false}})},
      {"Qwen3", SmallConfig("qwen3", {{"use_sliding_window", false}})},
      {"Mixtral", SmallConfig("mixtral", {{"num_local_experts", 4}, {"num_experts_per_tok", 2}})},
      {"Qwen3Moe", SmallConfig("qwen3_moe", experts)},
  };
}

constexpr int64_t kRows = 17;

// Runs blocks of a random model on random hidden states.
class BlockRig {
 public:
  explicit BlockRig(const ordered_json& config)
      : source_(MakeRandomModel(config, 11)), backend_(MakeCpuBackend(2).value()) {
    rope_ = MakeRopeTables(this->config(), kRows, *backend_).value();
    Numbers numbers(5);
    input_ = Tensor::Host(DType::kF32, {kRows, this->config().hidden_size}).value();
    for (int64_t i = 0; i < input_.elements(); ++i) input_.as<float>()[i] = numbers.Next();
  }
  const ModelConfig& config() const { return source_->config(); }
  Backend& backend() { return *backend_; }
  BlockWeights Load(int64_t block) { return source_->LoadBlock(block, *backend_).value(); }

  // The block's output. Experts are those that `routing` holds, or, when it is empty, chosen and
  // kept there: a choice may be a tie but for rounding.
  Tensor Run(const BlockWeights& weights, int64_t block, Routing* routing) {
    Tensor hidden = Tensor::Host(DType::kF32, input_.shape()).value();
    EXPECT_TRUE(backend_->Copy(input_, &hidden).ok());
    BlockRun run;
    run.routing = routing;
    const absl::Status status = RunBlock(*backend_, config(), weights, block, rope_, run, &hidden);
    EXPECT_TRUE(status.ok()) << status;
    return hidden;
  }

  // Largest difference of the outputs over the largest output.
  double Difference(const BlockWeights& a, const BlockWeights& b, int64_t block) {
    Routing routing;
    const Tensor x = Run(a, block, &routing), y = Run(b, block, &routing);
    double worst = 0, largest = 0;
    for (int64_t i = 0; i < x.elements(); ++i) {
      const double difference = std::abs(double{x.as<float>()[i]} - y.as<float>()[i]);
      if (!(difference <= worst)) worst = difference;
      largest = std::max(largest, std::abs(double{x.as<float>()[i]}));
    }
    return worst / largest;
  }

 private:
  std::unique_ptr<MemorySource> source_;
  std::unique_ptr<Backend> backend_;
  RopeTables rope_;
  Tensor input_;
};

// A block is about a dozen sums over at most 64 terms, each rounded anew after an edit; products
// with a scale and its inverse add two roundings per factor.
const double kTolerance = 2 * FloatTolerance(64, 12, 1.0);

class EverySite : public ::testing::TestWithParam<Case> {};

TEST_P(EverySite, ScalingPreservesTheBlock) {
  BlockRig rig(GetParam().config);
  for (int64_t block = 0; block < 2; ++block) {
    const BlockWeights original = rig.Load(block);
    const BlockEditor editor(rig.config(), block, original, rig.backend());
    for (const ScaleSite& site : editor.sites()) {
      BlockWeights edited = original;
      const BlockEdit edit = {EditKind::kScale, site.id, RandomScale(site.channels, 3)};
      ASSERT_TRUE(editor.Check(edit).ok());
      std::set<std::string> changed;
      ASSERT_TRUE(editor.Apply(edit, &edited, &changed).ok());
      EXPECT_LE(rig.Difference(original, edited, block), kTolerance) << site.id;
      EXPECT_GE(changed.size(), 1 + site.consumers.size());
      // Left out, a consumer shows: the check can fail.
      BlockWeights broken = edited;
      const std::string consumer = site.consumers.back().name + ".weight";
      BlockWeights handles = original;
      *BlockTensors(rig.config(), block, &broken).Find(consumer) =
          *BlockTensors(rig.config(), block, &handles).Find(consumer);
      if (site.consumers.back().is_slot() && rig.config().experts == 0) {
        EXPECT_GT(rig.Difference(original, broken, block), 1e-3) << site.id;
      }
    }
  }
}

TEST_P(EverySite, EditsOfAllSitesCompose) {
  BlockRig rig(GetParam().config);
  const BlockWeights original = rig.Load(1);
  const BlockEditor editor(rig.config(), 1, original, rig.backend());
  BlockWeights edited = original;
  std::set<std::string> changed;
  for (uint64_t round = 0; round < 2; ++round) {
    for (const ScaleSite& site : editor.sites()) {
      ASSERT_TRUE(editor
                      .Apply({EditKind::kScale, site.id, RandomScale(site.channels, round)},
                             &edited, &changed)
                      .ok());
      if (site.rotation_block == 0) continue;
      const BlockEdit rotation = {EditKind::kRotate, site.id,
                                  RandomRotation(site.channels, site.rotation_block, round)};
      ASSERT_TRUE(editor.Check(rotation).ok());
      ASSERT_TRUE(editor.Apply(rotation, &edited, &changed).ok());
    }
  }
  // Four scalings and two rotations one after the other.
  EXPECT_LE(rig.Difference(original, edited, 1), 4 * kTolerance);
}

INSTANTIATE_TEST_SUITE_P(Architectures, EverySite, ::testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

TEST(SitesTest, ValuesFeedSeveralQueryHeads) {
  const ModelConfig config =
      ParseModelConfig(SmallConfig("llama", {{"head_dim", 2}})).value();  // 4 heads, 2 shared
  const std::vector<ScaleSite> sites = BlockSites(config, 0);
  ASSERT_EQ(sites.size(), 4u);
  EXPECT_EQ(sites[1].id, "model.layers.0.self_attn.v_proj");
  EXPECT_EQ(sites[1].channels, 4);
  EXPECT_THAT(sites[1].consumers[0].channel_map, ElementsAre(0, 1, 0, 1, 2, 3, 2, 3));
}

TEST(SitesTest, RouterIsAConsumerAndNoSlot) {
  const ModelConfig config = ParseModelConfig(SmallConfig("mixtral", {{"num_local_experts", 3},
                                                                      {"num_experts_per_tok", 1}}))
                                 .value();
  const std::vector<ScaleSite> sites = BlockSites(config, 1);
  ASSERT_EQ(sites.size(), 6u);
  EXPECT_EQ(sites[2].consumers.size(), 7u);
  EXPECT_EQ(sites[2].consumers.back().name, "model.layers.1.block_sparse_moe.gate");
  EXPECT_FALSE(sites[2].consumers.back().is_slot());
  EXPECT_EQ(sites[5].id, "model.layers.1.block_sparse_moe.experts.2.w3");
  EXPECT_EQ(sites[5].consumers[0].name, "model.layers.1.block_sparse_moe.experts.2.w2");
}

class BlockEditorTest : public ::testing::Test {
 protected:
  absl::Status Check(EditKind kind, const std::string& target, Tensor value) {
    return editor_.Check({kind, target, std::move(value)});
  }
  static Tensor Filled(const Shape& shape, float value) {
    Tensor tensor = Tensor::Host(DType::kF32, shape).value();
    std::fill_n(tensor.as<float>(), tensor.elements(), value);
    return tensor;
  }
  static std::string Text(const absl::Status& status) { return std::string(status.message()); }

  const std::string block_ = "model.layers.0.";
  BlockRig rig_{SmallConfig("llama")};
  BlockWeights weights_ = rig_.Load(0);
  BlockEditor editor_{rig_.config(), 0, weights_, rig_.backend()};
};

TEST_F(BlockEditorTest, RefusesWhatIsWrong) {
  const std::string norm = block_ + "input_layernorm", v = block_ + "self_attn.v_proj";
  EXPECT_THAT(Text(Check(EditKind::kScale, block_ + "mlp", Filled({32}, 1))),
              HasSubstr("no scale site"));
  EXPECT_THAT(Text(Check(EditKind::kScale, norm, Filled({31}, 1))), HasSubstr("32 channels"));
  EXPECT_THAT(Text(Check(EditKind::kScale, norm, Filled({32}, 0))), HasSubstr("channel 0 is 0"));
  EXPECT_THAT(Text(Check(EditKind::kScale, norm, Filled({32}, NAN))), HasSubstr("NaN"));
  EXPECT_THAT(Text(Check(EditKind::kScale, norm, Tensor())), HasSubstr("no f32 tensor"));
  EXPECT_THAT(Text(Check(EditKind::kRotate, norm, Filled({32, 32}, 0))),
              HasSubstr("cannot be rotated"));
  EXPECT_THAT(Text(Check(EditKind::kRotate, v, Filled({32, 32}, 1))),
              HasSubstr("different heads of 16"));
  Tensor twice = Filled({32, 32}, 0);
  for (int64_t i = 0; i < 32; ++i) twice.as<float>()[i * 33] = 2;
  EXPECT_THAT(Text(Check(EditKind::kRotate, v, twice)), HasSubstr("not orthogonal"));
  EXPECT_THAT(Text(Check(EditKind::kClip, block_ + "mlp.nothing", Filled({48, 1}, 1))),
              HasSubstr("no linear"));
  EXPECT_THAT(Text(Check(EditKind::kClip, block_ + "mlp.up_proj", Filled({48, 5}, 1))),
              HasSubstr("divides 32"));
  EXPECT_THAT(Text(Check(EditKind::kClip, block_ + "mlp.up_proj", Filled({48, 4}, -1))),
              HasSubstr("negative"));
  EXPECT_THAT(Text(Check(EditKind::kReplace, block_ + "mlp.up_proj", Filled({48, 32}, 1))),
              HasSubstr("no tensor"));
  EXPECT_THAT(Text(Check(EditKind::kReplace, norm + ".weight", Filled({48}, 1))),
              HasSubstr("[32]"));
}

TEST_F(BlockEditorTest, ClipAndReplace) {
  BlockWeights edited = weights_;
  std::set<std::string> changed;
  Tensor limits = Filled({48, 2}, 10);
  limits.as<float>()[0] = 0.25f;  // row 0, inputs 0 .. 15
  ASSERT_TRUE(
      editor_.Apply({EditKind::kClip, block_ + "mlp.up_proj", limits}, &edited, &changed).ok());
  const float* before = weights_.up.dense.as<float>();
  const float* after = edited.up.dense.as<float>();
  for (int64_t i = 0; i < edited.up.dense.elements(); ++i) {
    EXPECT_EQ(after[i], i < 16 ? std::clamp(before[i], -0.25f, 0.25f) : before[i]);
  }
  const Tensor norm = Filled({32}, 0.5f);
  ASSERT_TRUE(
      editor_
          .Apply({EditKind::kReplace, block_ + "input_layernorm.weight", norm}, &edited, &changed)
          .ok());
  EXPECT_EQ(edited.input_norm.as<float>()[31], 0.5f);
  EXPECT_THAT(changed,
              ElementsAre(block_ + "input_layernorm.weight", block_ + "mlp.up_proj.weight"));
  EXPECT_EQ(weights_.input_norm.as<float>()[31], rig_.Load(0).input_norm.as<float>()[31]);
}

// A norm stored in 16 bits is rounded once and the consumers get the ratio: nothing is lost.
TEST_F(BlockEditorTest, RoundedNormIsCompensated) {
  BlockWeights stored = weights_;
  stored.input_norm = Tensor::Host(DType::kBF16, {32}).value();
  ASSERT_TRUE(rig_.backend().Copy(weights_.input_norm, &stored.input_norm).ok());
  const BlockEditor editor(rig_.config(), 0, stored, rig_.backend());
  BlockWeights edited = stored;
  std::set<std::string> changed;
  const BlockEdit edit = {EditKind::kScale, block_ + "input_layernorm", RandomScale(32, 4)};
  const BlockEdit applied = editor.Apply(edit, &edited, &changed).value();
  EXPECT_LE(rig_.Difference(stored, edited, 0), kTolerance);
  for (int64_t c = 0; c < 32; ++c) {
    const double ratio = applied.value.as<float>()[c] / edit.value.as<float>()[c];
    EXPECT_NEAR(ratio, 1, 0x1p-8) << c;
  }
  const float norm = edited.input_norm.as<float>()[7];
  ASSERT_TRUE(editor.Round({block_ + "input_layernorm.weight"}, &edited).ok());
  EXPECT_EQ(edited.input_norm.dtype(), DType::kBF16);
  Tensor back = Tensor::Host(DType::kF32, {32}).value();
  ASSERT_TRUE(rig_.backend().Copy(edited.input_norm, &back).ok());
  EXPECT_EQ(back.as<float>()[7], norm);
}

TEST_F(BlockEditorTest, NormThatLeavesItsRangeIsRefused) {
  BlockWeights stored = weights_;
  stored.input_norm = Tensor::Host(DType::kF16, {32}).value();
  ASSERT_TRUE(rig_.backend().Copy(weights_.input_norm, &stored.input_norm).ok());
  const BlockEditor editor(rig_.config(), 0, stored, rig_.backend());
  for (const float scale : {1e-6f, 1e9f}) {
    BlockWeights edited = stored;
    std::set<std::string> changed;
    const absl::Status status =
        editor
            .Apply({EditKind::kScale, block_ + "input_layernorm", Filled({32}, scale)}, &edited,
                   &changed)
            .status();
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_THAT(Text(status), HasSubstr("leaves the range"));
  }
}

}  // namespace
}  // namespace quantmill
