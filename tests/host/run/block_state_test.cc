#include "host/run/block_state.h"

#include <cmath>
#include <memory>

#include "core/calib/calibration.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/core/model/random_model.h"

namespace quantmill {
namespace {

using testing::MakeRandomModel;
using testing::MemorySource;
using testing::SmallConfig;

constexpr int64_t kWindows = 4;
constexpr int64_t kLength = 16;

Tensor Filled(const Shape& shape, float value) {
  Tensor tensor = Tensor::Host(DType::kF32, shape).value();
  std::fill_n(tensor.as<float>(), tensor.elements(), value);
  return tensor;
}

// Magnitudes from 1/4 to 4, either sign.
Tensor Scales(int64_t channels) {
  Tensor scale = Filled({channels}, 1);
  for (int64_t c = 0; c < channels; ++c) {
    scale.as<float>()[c] =
        std::exp2(static_cast<float>(c * 7 % 17) / 4.0f - 2.0f) * (c % 3 == 0 ? -1.0f : 1.0f);
  }
  return scale;
}

class BlockStateTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const nlohmann::ordered_json changes =
        GetParam() == "mixtral"
            ? nlohmann::ordered_json({{"num_local_experts", 3}, {"num_experts_per_tok", 2}})
            : nlohmann::ordered_json();
    source_ = MakeRandomModel(SmallConfig(GetParam(), changes), 5);
    backend_ = MakeCpuBackend(2).value();
    const Tensor windows =
        Tensor::FromI32({kWindows, kLength},
                        testing::RandomIds(kWindows * kLength, source_->config().vocab_size, 2));
    CalibrationOptions options;
    options.keep_original = true;
    calibration_ = Calibration::Create(*backend_, source_->config(), windows,
                                       source_->Embedding().value(), options)
                       .value();
    state_ = std::make_unique<BlockState>(source_->config(), 0, *backend_);
    state_->SetWeights(source_->LoadBlock(0, *backend_).value());
    for (const LinearSlot& slot : BlockSlots(source_->config(), 0)) {
      groups_ = std::max(groups_, slot.input_group + 1);
    }
  }

  std::vector<StatRequest> Requests() const {
    std::vector<StatRequest> requests;
    for (int group = 0; group < groups_; ++group) {
      for (const bool original : {false, true}) {
        for (StatKind kind : {StatKind::kHessian, StatKind::kAbsMean, StatKind::kAbsMax}) {
          requests.push_back({group, kind, 0, original});
        }
        requests.push_back({group, StatKind::kRows, 9, original});
      }
      requests.push_back({group, StatKind::kCross, 0, false});
    }
    return requests;
  }
  Statistics Measure() {
    Statistics statistics;
    const absl::Status status =
        calibration_->Collect(state_->dense(), &state_->original(), Requests(), &statistics);
    EXPECT_TRUE(status.ok()) << status;
    return statistics;
  }
  // What the state still has equals what a new measurement gives.
  void ExpectTrue() {
    const Statistics fresh = Measure();
    for (const auto& [request, value] : state_->statistics().tensors()) {
      const Tensor& expected = *fresh.Find(request);
      double worst = 0, largest = 1e-6;
      for (int64_t i = 0; i < value.elements(); ++i) {
        worst = std::max(worst, std::abs(double{value.as<float>()[i]} - expected.as<float>()[i]));
        largest = std::max(largest, std::abs(double{expected.as<float>()[i]}));
      }
      EXPECT_LE(worst, 1e-5 * largest)
          << StatId(request.kind) << " of group " << request.input_group;
    }
  }
  std::set<int> GroupsKept() const {
    std::set<int> groups;
    for (const auto& [request, value] : state_->statistics().tensors()) {
      groups.insert(request.input_group);
    }
    return groups;
  }

  std::unique_ptr<MemorySource> source_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Calibration> calibration_;
  std::unique_ptr<BlockState> state_;
  int groups_ = 0;
};

TEST_P(BlockStateTest, ScalingTransformsTheStatistics) {
  state_->statistics() = Measure();
  std::vector<BlockEdit> edits;
  for (const ScaleSite& site : state_->editor()->sites()) {
    edits.push_back({EditKind::kScale, site.id, Scales(site.channels)});
  }
  ASSERT_TRUE(state_->Apply(edits).ok());
  EXPECT_EQ(GroupsKept().size(), static_cast<size_t>(groups_));  // nothing had to be forgotten
  ExpectTrue();
}

TEST_P(BlockStateTest, OtherEditsForgetWhatTheyMakeStale) {
  const std::string block = "model.layers.0.";
  for (const LinearSlot& slot : BlockSlots(source_->config(), 0)) {
    state_->SetWeights(source_->LoadBlock(0, *backend_).value());
    state_->statistics() = Measure();
    const BlockEdit clip = {EditKind::kClip, slot.name, Filled({slot.out_features, 1}, 0.02f)};
    ASSERT_TRUE(state_->Apply({&clip, 1}).ok());
    EXPECT_TRUE(GroupsKept().contains(slot.input_group)) << slot.name;
    ExpectTrue();
  }
  for (const char* norm : {"input_layernorm.weight", "post_attention_layernorm.weight"}) {
    state_->SetWeights(source_->LoadBlock(0, *backend_).value());
    state_->statistics() = Measure();
    const BlockEdit replace = {EditKind::kReplace, block + norm, Filled({32}, 0.5f)};
    ASSERT_TRUE(state_->Apply({&replace, 1}).ok());
    ExpectTrue();
  }
}

// A slot that is packed keeps its dequantized weight when the block is rounded; others are rounded
// to what the checkpoint stores.
TEST_P(BlockStateTest, PackedSlotsAreNotRounded) {
  BlockWeights stored = source_->LoadBlock(0, *backend_).value();
  for (Tensor* tensor : {&stored.o.dense, &stored.v.dense}) {
    Tensor coarse = Tensor::Host(DType::kBF16, tensor->shape()).value();
    ASSERT_TRUE(backend_->Copy(*tensor, &coarse).ok());
    *tensor = coarse;
  }
  state_->SetWeights(stored);
  const ScaleSite& site = state_->editor()->sites()[1];
  const BlockEdit edit = {EditKind::kScale, site.id, Scales(site.channels)};
  ASSERT_TRUE(state_->Apply({&edit, 1}).ok());
  EXPECT_EQ(state_->current().v.dense.dtype(), DType::kF32);
  const LinearSlot v = BlockSlots(source_->config(), 0)[2];
  ASSERT_EQ(v.role, "attn.v");
  LinearWeight packed;
  packed.dense = Filled(stored.v.dense.shape(), 0.1f);
  ASSERT_TRUE(state_->Put(v, packed).ok());
  ASSERT_TRUE(state_->Finish().ok());
  EXPECT_EQ(state_->current().v.dense.as<float>()[0], 0.1f);
  EXPECT_EQ(state_->current().o.dense.dtype(), DType::kBF16);
  EXPECT_EQ(state_->dense().o.dense.dtype(), DType::kF32);
  EXPECT_EQ(state_->untouched().o.dense.data(), stored.o.dense.data());
}

INSTANTIATE_TEST_SUITE_P(Models, BlockStateTest, ::testing::Values("llama", "qwen3", "mixtral"));

}  // namespace
}  // namespace quantmill
