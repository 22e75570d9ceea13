#include "core/model/graph.h"

#include <map>
#include <set>
#include <string>

#include "core/io/checkpoint_files.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

using ::testing::ElementsAre;

// Two layers, the second a mixture of two experts.
ModelConfig Mixed(Architecture architecture) {
  ModelConfig config;
  config.architecture = architecture;
  config.hidden_size = 8;
  config.intermediate_size = 12;
  config.layers = 2;
  config.heads = 4;
  config.kv_heads = 2;
  config.head_dim = 6;
  config.vocab_size = 10;
  config.experts = 2;
  config.experts_per_token = 1;
  config.expert_intermediate_size = 5;
  config.moe_layer = {false, true};
  return config;
}

std::vector<std::string> Describe(const std::vector<LinearSlot>& slots) {
  std::vector<std::string> lines;
  for (const LinearSlot& slot : slots) {
    lines.push_back(slot.name + " " + slot.role + " " + std::to_string(slot.out_features) + "x" +
                    std::to_string(slot.in_features) + (slot.has_bias ? " bias" : "") + " #" +
                    std::to_string(slot.input_group) + " @" + std::to_string(slot.block));
  }
  return lines;
}

TEST(GraphTest, DenseBlock) {
  ModelConfig config = Mixed(Architecture::kQwen3Moe);
  config.qkv_bias = true;
  EXPECT_THAT(Describe(BlockSlots(config, 0)),
              ElementsAre("model.layers.0.self_attn.q_proj attn.q 24x8 bias #0 @0",
                          "model.layers.0.self_attn.k_proj attn.k 12x8 bias #0 @0",
                          "model.layers.0.self_attn.v_proj attn.v 12x8 bias #0 @0",
                          "model.layers.0.self_attn.o_proj attn.o 8x24 #1 @0",
                          "model.layers.0.mlp.gate_proj mlp.gate 12x8 #2 @0",
                          "model.layers.0.mlp.up_proj mlp.up 12x8 #2 @0",
                          "model.layers.0.mlp.down_proj mlp.down 8x12 #3 @0"));
}

TEST(GraphTest, ExpertBlocks) {
  const auto qwen = Describe(BlockSlots(Mixed(Architecture::kQwen3Moe), 1));
  ASSERT_EQ(qwen.size(), 10u);
  EXPECT_EQ(qwen[4], "model.layers.1.mlp.experts.0.gate_proj expert.gate 5x8 #2 @1");
  EXPECT_EQ(qwen[9], "model.layers.1.mlp.experts.1.down_proj expert.down 8x5 #5 @1");
  const auto mixtral = Describe(BlockSlots(Mixed(Architecture::kMixtral), 1));
  EXPECT_EQ(mixtral[4], "model.layers.1.block_sparse_moe.experts.0.w1 expert.gate 5x8 #2 @1");
  EXPECT_EQ(mixtral[5], "model.layers.1.block_sparse_moe.experts.0.w3 expert.up 5x8 #2 @1");
  EXPECT_EQ(mixtral[6], "model.layers.1.block_sparse_moe.experts.0.w2 expert.down 8x5 #3 @1");
  EXPECT_EQ(RouterName(Mixed(Architecture::kMixtral), 1), "model.layers.1.block_sparse_moe.gate");
  EXPECT_EQ(RouterName(Mixed(Architecture::kQwen3Moe), 1), "model.layers.1.mlp.gate");
}

TEST(GraphTest, AllSlotsAndHead) {
  const ModelConfig config = Mixed(Architecture::kMixtral);
  EXPECT_EQ(AllSlots(config).size(), 17u);
  EXPECT_THAT(Describe({HeadSlot(config)}), ElementsAre("lm_head head 10x8 #0 @-1"));
}

TEST(GraphTest, RequiredTensors) {
  ModelConfig config = Mixed(Architecture::kQwen3Moe);
  config.qk_norm = true;
  std::map<std::string, std::string> shapes;
  for (const TensorSpec& spec : RequiredTensors(config)) shapes[spec.name] = spec.shape.ToString();
  EXPECT_EQ(shapes.size(), 1u + 2 * 4 + 7 + 1 + 10 + 1 + 1);
  EXPECT_EQ(shapes.at("model.layers.1.mlp.gate.weight"), "[2, 8]");
  EXPECT_EQ(shapes.at("model.layers.0.self_attn.k_norm.weight"), "[6]");
  EXPECT_EQ(shapes.at("lm_head.weight"), "[10, 8]");
  config.tied_embeddings = true;
  EXPECT_EQ(RequiredTensors(config).size(), shapes.size() - 1);
}

// Every tensor of a real checkpoint is required, and the other way round.
TEST(GraphTest, EqualsRealCheckpoints) {
  QM_SHARED_OR_SKIP(models, "models");
  for (const char* name : {"/small-llama", "/arch/llama3-rope", "/arch/mixtral", "/arch/qwen2"}) {
    const auto checkpoint = Checkpoint::Open(models + name).value();
    std::set<std::string> stored, required;
    for (const CheckpointTensor& tensor : checkpoint->tensors()) {
      stored.insert(tensor.entry->name + " " + tensor.entry->ShapeText());
    }
    const ModelConfig config = ReadModelConfig(models + name).value();
    for (const TensorSpec& spec : RequiredTensors(config)) {
      required.insert(spec.name + " " + spec.shape.ToString());
    }
    EXPECT_EQ(stored, required) << name;
  }
}

}  // namespace
}  // namespace quantmill
