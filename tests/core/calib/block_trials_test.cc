#include "core/calib/block_trials.h"

#include <cmath>
#include <memory>

#include "core/model/block_edits.h"
#include "core/model/block_parts.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/core/model/random_model.h"

namespace quantmill {
namespace {

using ::nlohmann::ordered_json;
using ::testing::HasSubstr;
using testing::MakeRandomModel;
using testing::MemorySource;
using testing::SmallConfig;

constexpr int64_t kTrialRows = 9;
constexpr int64_t kTrialWindows = 3;
constexpr char kBlock[] = "model.layers.1.";

class TrialsRig {
 public:
  explicit TrialsRig(const ordered_json& config, int64_t cache_bytes = 1 << 20)
      : source_(MakeRandomModel(config, 21)),
        backend_(MakeCpuBackend(2).value()),
        weights_(source_->LoadBlock(1, *backend_).value()),
        rope_(MakeRopeTables(source_->config(), kTrialRows, *backend_).value()),
        trials_(
            *backend_, source_->config(), 1, weights_, kTrialWindows,
            [this](int64_t window) {
              ++loads_;
              return Input(window);
            },
            cache_bytes) {}

  Tensor Input(int64_t window) {
    Tensor input = Tensor::Host(DType::kF32, {kTrialRows, source_->config().hidden_size}).value();
    uint64_t state = static_cast<uint64_t>(window) * 2 + 1;
    for (int64_t i = 0; i < input.elements(); ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      input.as<float>()[i] = static_cast<float>(static_cast<double>(state >> 11) * 0x1p-52 - 1.0);
    }
    return input;
  }

  // A copy of one of the block's tensors times `factor`.
  TensorOverride Scaled(const std::string& name, float factor) {
    BlockWeights handles = weights_;
    const Tensor* tensor = BlockTensors(source_->config(), 1, &handles).Find(kBlock + name);
    EXPECT_NE(tensor, nullptr) << name;
    Tensor value = Tensor::Host(DType::kF32, tensor->shape()).value();
    for (int64_t i = 0; i < value.elements(); ++i) {
      value.as<float>()[i] = tensor->as<float>()[i] * factor;
    }
    return {kBlock + name, value};
  }

  // The loss of the whole block from two independent runs of it.
  double BlockLoss(const std::vector<TensorOverride>& overrides) {
    BlockWeights changed = weights_;
    const BlockTensors tensors(source_->config(), 1, &changed);
    for (const TensorOverride& o : overrides) *tensors.Find(o.name) = o.value;
    double sum = 0;
    int64_t count = 0;
    for (int64_t window = 0; window < kTrialWindows; ++window) {
      Tensor a = Input(window), b = Input(window);
      EXPECT_TRUE(RunBlock(*backend_, source_->config(), weights_, 1, rope_, BlockRun{}, &a).ok());
      EXPECT_TRUE(RunBlock(*backend_, source_->config(), changed, 1, rope_, BlockRun{}, &b).ok());
      for (int64_t i = 0; i < a.elements(); ++i, ++count) {
        const double difference = double{a.as<float>()[i]} - b.as<float>()[i];
        sum += difference * difference;
      }
    }
    return sum / static_cast<double>(count);
  }

  double Loss(const std::string& submodule, const std::vector<TensorOverride>& overrides) {
    const absl::StatusOr<double> loss = trials_.Loss(submodule, 0, kTrialWindows, overrides);
    EXPECT_TRUE(loss.ok()) << loss.status();
    return loss.value_or(-1);
  }
  BlockTrials& trials() { return trials_; }
  int loads() const { return loads_; }

 private:
  std::unique_ptr<MemorySource> source_;
  std::unique_ptr<Backend> backend_;
  BlockWeights weights_;
  RopeTables rope_;
  int loads_ = 0;
  BlockTrials trials_;
};

std::vector<std::pair<std::string, ordered_json>> Models() {
  return {
      {"llama", SmallConfig("llama", {{"attention_bias", true}})},
      {"qwen3", SmallConfig("qwen3", {{"use_sliding_window", false}})},
      {"mixtral", SmallConfig("mixtral", {{"num_local_experts", 3}, {"num_experts_per_tok", 2}})}};
}

std::vector<std::string> TensorsOf(const std::string& model) {
  std::vector<std::string> names = {"input_layernorm.weight", "post_attention_layernorm.weight"};
  for (const char* linear : {"q", "k", "v", "o"}) {
    names.push_back(std::string("self_attn.") + linear + "_proj.weight");
  }
  if (model == "llama") names.push_back("self_attn.v_proj.bias");
  if (model == "qwen3") names.push_back("self_attn.q_norm.weight");
  if (model == "mixtral") {
    names.insert(names.end(),
                 {"block_sparse_moe.gate.weight", "block_sparse_moe.experts.1.w1.weight",
                  "block_sparse_moe.experts.1.w2.weight"});
  } else {
    names.insert(names.end(),
                 {"mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"});
  }
  return names;
}

// Whatever is touched, a cached trial of the whole block equals two plain runs of it.
TEST(BlockTrialsTest, WholeBlockEqualsPlainRuns) {
  for (const auto& [model, config] : Models()) {
    TrialsRig rig(config);
    for (const std::string& name : TensorsOf(model)) {
      const std::vector<TensorOverride> overrides = {rig.Scaled(name, 1.3f)};
      const double expected = rig.BlockLoss(overrides);
      EXPECT_GT(expected, 0) << model << " " << name;
      // The same outputs, summed in another order.
      EXPECT_NEAR(rig.Loss("", overrides) / expected, 1, 1e-12) << model << " " << name;
    }
    EXPECT_EQ(rig.Loss("", {}), 0);
  }
}

// For a linear with its weight scaled by 1.3 the difference is 0.3 of its output, and so what is
// behind it: a half's output without bias is linear in its last weight.
TEST(BlockTrialsTest, SubmodulesSeeTheirOwnOutput) {
  TrialsRig rig(SmallConfig("llama"));
  const std::vector<TensorOverride> down = {rig.Scaled("mlp.down_proj.weight", 1.3f)};
  const double linear = rig.Loss(std::string(kBlock) + "mlp.down_proj", down);
  EXPECT_GT(linear, 0);
  // The output of `mlp` is that of down, and the block adds the residual to both sides.
  EXPECT_EQ(rig.Loss("mlp", down), linear);
  EXPECT_NEAR(rig.Loss("", down) / linear, 1, 1e-4);
  EXPECT_EQ(rig.Loss("self_attn", down), 0);
  const std::vector<TensorOverride> o = {rig.Scaled("self_attn.o_proj.weight", 1.3f)};
  EXPECT_EQ(rig.Loss("self_attn", o), rig.Loss(std::string(kBlock) + "self_attn.o_proj", o));
  EXPECT_EQ(rig.Loss(std::string(kBlock) + "self_attn.q_proj", o), 0);
}

// Tensors before the submodule change its input.
TEST(BlockTrialsTest, EarlierTensorsChangeTheInput) {
  TrialsRig rig(SmallConfig("llama"));
  const std::vector<TensorOverride> norm = {rig.Scaled("input_layernorm.weight", 2.0f)};
  // v is linear: twice the input is a difference of one output.
  const std::vector<TensorOverride> v = {rig.Scaled("self_attn.v_proj.weight", 2.0f)};
  const std::string name = std::string(kBlock) + "self_attn.v_proj";
  EXPECT_NEAR(rig.Loss(name, norm) / rig.Loss(name, v), 1, 1e-5);
  for (const std::string linear : {"mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"}) {
    EXPECT_GT(rig.Loss(kBlock + linear, norm), 0) << linear;
  }
  EXPECT_GT(rig.Loss(std::string(kBlock) + "mlp.down_proj", {rig.Scaled("mlp.up_proj.weight", 2)}),
            0);
  EXPECT_GT(rig.Loss("mlp", v), 0);
}

TEST(BlockTrialsTest, WhatIsNotTouchedIsNotRunAgain) {
  TrialsRig rig(SmallConfig("llama"));
  for (int step = 1; step < 6; ++step) {
    const float factor = 1.0f + 0.1f * static_cast<float>(step);
    rig.Loss("mlp", {rig.Scaled("mlp.up_proj.weight", factor)});
    EXPECT_EQ(rig.loads(), kTrialWindows);
  }
  // Another submodule: its inputs are made once.
  rig.Loss("self_attn", {rig.Scaled("self_attn.o_proj.weight", 1.1f)});
  rig.Loss("self_attn", {rig.Scaled("self_attn.o_proj.weight", 1.2f)});
  EXPECT_EQ(rig.loads(), 2 * kTrialWindows);
}

TEST(BlockTrialsTest, WithoutRoomEverythingIsComputedEachTime) {
  TrialsRig cached(SmallConfig("llama")), bare(SmallConfig("llama"), 0);
  for (float factor : {1.1f, 1.2f}) {
    const std::vector<TensorOverride> overrides = {cached.Scaled("mlp.up_proj.weight", factor)};
    EXPECT_EQ(cached.Loss("mlp", overrides), bare.Loss("mlp", overrides));
  }
  EXPECT_EQ(bare.loads(), 2 * kTrialWindows);
}

TEST(BlockTrialsTest, ExpertWithoutRowsLosesNothing) {
  TrialsRig rig(SmallConfig("mixtral", {{"num_local_experts", 64}, {"num_experts_per_tok", 1}}));
  int silent = 0;
  for (int expert = 0; expert < 64; ++expert) {
    const std::string name = "block_sparse_moe.experts." + std::to_string(expert) + ".w1";
    silent += rig.Loss(kBlock + name, {rig.Scaled(name + ".weight", 2.0f)}) == 0;
  }
  EXPECT_GT(silent, 0);  // 27 rows for 64 experts
  EXPECT_LT(silent, 64);
}

TEST(BlockTrialsTest, ForwardRunsOneWindow) {
  TrialsRig rig(SmallConfig("llama"));
  const Tensor plain = rig.trials().Forward(1, {}).value();
  EXPECT_EQ(plain.dim(0), kTrialRows);
  const TensorOverride override = rig.Scaled("mlp.down_proj.weight", 2.0f);
  const Tensor changed = rig.trials().Forward(1, {&override, 1}).value();
  EXPECT_NE(plain.as<float>()[0], changed.as<float>()[0]);
}

// A step along the gradient of an overridden tensor changes <d_out, Forward> by its square.
TEST(BlockTrialsTest, VjpIsTheSlopeOfForward) {
  for (const auto& [model, config] : Models()) {
    if (model == "mixtral") continue;
    TrialsRig rig(config);
    const Tensor d_out = rig.Input(7);
    for (const std::string& name : TensorsOf(model)) {
      const TensorOverride at = rig.Scaled(name, 1.1f);
      const NamedTensor gradient = {at.name,
                                    Tensor::HostZeros(DType::kF32, at.value.shape()).value()};
      ASSERT_TRUE(rig.trials().Vjp(1, {&at, 1}, d_out, {&gradient, 1}).ok()) << name;
      double square = 0, values[2];
      for (int64_t i = 0; i < gradient.tensor.elements(); ++i) {
        square += double{gradient.tensor.as<float>()[i]} * gradient.tensor.as<float>()[i];
      }
      const double step = 0.02 / std::sqrt(square);
      for (int side = 0; side < 2; ++side) {
        TensorOverride moved = {at.name, Tensor::Host(DType::kF32, at.value.shape()).value()};
        for (int64_t i = 0; i < moved.value.elements(); ++i) {
          moved.value.as<float>()[i] =
              at.value.as<float>()[i] +
              static_cast<float>((side == 0 ? step : -step) * gradient.tensor.as<float>()[i]);
        }
        const Tensor output = rig.trials().Forward(1, {&moved, 1}).value();
        values[side] = 0;
        for (int64_t i = 0; i < output.elements(); ++i) {
          values[side] += double{output.as<float>()[i]} * d_out.as<float>()[i];
        }
      }
      // Of second order in the step, and the rounding of f32 outputs.
      EXPECT_NEAR((values[0] - values[1]) / (2 * step), square, 0.01 * square) << model << name;
    }
  }
}

TEST(BlockTrialsTest, VjpRefusals) {
  TrialsRig rig(SmallConfig("llama")),
      experts(SmallConfig("mixtral", {{"num_local_experts", 3}, {"num_experts_per_tok", 2}}));
  const Tensor d_out = rig.Input(0);
  const NamedTensor norm = {std::string(kBlock) + "input_layernorm.weight",
                            Tensor::HostZeros(DType::kF32, {32}).value()};
  EXPECT_EQ(experts.trials().Vjp(0, {}, d_out, {&norm, 1}).code(),
            absl::StatusCode::kUnimplemented);
  EXPECT_EQ(rig.trials().Vjp(9, {}, d_out, {&norm, 1}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(rig.trials().Vjp(0, {}, norm.tensor, {&norm, 1}).code(),
            absl::StatusCode::kInvalidArgument);
  const NamedTensor other = {"model.norm.weight", norm.tensor};
  EXPECT_EQ(rig.trials().Vjp(0, {}, d_out, {&other, 1}).code(), absl::StatusCode::kNotFound);
}

TEST(BlockTrialsTest, Refusals) {
  TrialsRig rig(SmallConfig("llama"));
  const auto text = [](const absl::Status& status) { return std::string(status.message()); };
  BlockTrials& trials = rig.trials();
  EXPECT_THAT(text(trials.Loss("attention", 0, 1, {}).status()), HasSubstr("use self_attn, mlp"));
  EXPECT_THAT(text(trials.Loss("", 2, 2, {}).status()), HasSubstr("the calibration has 3"));
  EXPECT_THAT(text(trials.Loss("", 0, 0, {}).status()), HasSubstr("the calibration has 3"));
  EXPECT_THAT(text(trials.Forward(-1, {}).status()), HasSubstr("no window -1"));
  TensorOverride wrong = rig.Scaled("mlp.up_proj.weight", 1);
  wrong.name = "model.layers.0.mlp.up_proj.weight";
  EXPECT_THAT(text(trials.Forward(0, {&wrong, 1}).status()), HasSubstr("no tensor"));
  wrong.name = std::string(kBlock) + "mlp.down_proj.weight";
  EXPECT_THAT(text(trials.Forward(0, {&wrong, 1}).status()), HasSubstr("has shape [32, 48]"));
}

}  // namespace
}  // namespace quantmill
