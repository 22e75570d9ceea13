#include "core/model/graph.h"

#include <initializer_list>
#include <utility>

#include "absl/strings/str_cat.h"

namespace quantmill {
namespace {

struct ProjectionNames {
  const char* gate;
  const char* up;
  const char* down;
};

// Module that holds the experts and the router ("gate") of a block.
std::string MoeName(const ModelConfig& config, int64_t block) {
  const bool mixtral = config.architecture == Architecture::kMixtral;
  return absl::StrCat(BlockName(block), mixtral ? ".block_sparse_moe" : ".mlp");
}

ProjectionNames ExpertNames(const ModelConfig& config) {
  if (config.architecture == Architecture::kMixtral) return {"w1", "w3", "w2"};
  return {"gate_proj", "up_proj", "down_proj"};
}

bool IsMoeBlock(const ModelConfig& config, int64_t block) {
  const size_t index = static_cast<size_t>(block);
  return index < config.moe_layer.size() && config.moe_layer[index];
}

void AddAttention(const ModelConfig& config, int block, std::vector<LinearSlot>* slots) {
  const std::string prefix = absl::StrCat(BlockName(block), ".self_attn.");
  const int64_t hidden = config.hidden_size, q = config.q_features(), kv = config.kv_features();
  slots->push_back({prefix + "q_proj", "attn.q", q, hidden, config.qkv_bias, 0, block});
  slots->push_back({prefix + "k_proj", "attn.k", kv, hidden, config.qkv_bias, 0, block});
  slots->push_back({prefix + "v_proj", "attn.v", kv, hidden, config.qkv_bias, 0, block});
  slots->push_back({prefix + "o_proj", "attn.o", hidden, q, config.o_bias, 1, block});
}

void AddMlp(const ModelConfig& config, int block, std::vector<LinearSlot>* slots) {
  const std::string prefix = absl::StrCat(BlockName(block), ".mlp.");
  const int64_t hidden = config.hidden_size, inner = config.intermediate_size;
  slots->push_back({prefix + "gate_proj", "mlp.gate", inner, hidden, config.mlp_bias, 2, block});
  slots->push_back({prefix + "up_proj", "mlp.up", inner, hidden, config.mlp_bias, 2, block});
  slots->push_back({prefix + "down_proj", "mlp.down", hidden, inner, config.mlp_bias, 3, block});
}

void AddExperts(const ModelConfig& config, int block, std::vector<LinearSlot>* slots) {
  const ProjectionNames names = ExpertNames(config);
  const int64_t hidden = config.hidden_size, inner = config.expert_intermediate_size;
  for (int64_t expert = 0; expert < config.experts; ++expert) {
    const std::string prefix = absl::StrCat(MoeName(config, block), ".experts.", expert, ".");
    const int group = static_cast<int>(2 + 2 * expert);
    slots->push_back({prefix + names.gate, "expert.gate", inner, hidden, false, group, block});
    slots->push_back({prefix + names.up, "expert.up", inner, hidden, false, group, block});
    slots->push_back({prefix + names.down, "expert.down", hidden, inner, false, group + 1, block});
  }
}

void AddLinear(const LinearSlot& slot, std::vector<TensorSpec>* specs) {
  specs->push_back({slot.name + ".weight", Shape{slot.out_features, slot.in_features}});
  if (slot.has_bias) specs->push_back({slot.name + ".bias", Shape{slot.out_features}});
}

void AddBlock(const ModelConfig& config, int64_t block, std::vector<TensorSpec>* specs) {
  const std::string name = BlockName(block);
  specs->push_back({name + ".input_layernorm.weight", Shape{config.hidden_size}});
  specs->push_back({name + ".post_attention_layernorm.weight", Shape{config.hidden_size}});
  if (config.qk_norm) {
    specs->push_back({name + ".self_attn.q_norm.weight", Shape{config.head_dim}});
    specs->push_back({name + ".self_attn.k_norm.weight", Shape{config.head_dim}});
  }
  if (IsMoeBlock(config, block)) {
    specs->push_back(
        {RouterName(config, block) + ".weight", Shape{config.experts, config.hidden_size}});
  }
  for (const LinearSlot& slot : BlockSlots(config, block)) AddLinear(slot, specs);
}

}  // namespace

std::string BlockName(int64_t block) { return absl::StrCat("model.layers.", block); }

std::string RouterName(const ModelConfig& config, int64_t block) {
  return MoeName(config, block) + ".gate";
}

std::vector<LinearSlot> BlockSlots(const ModelConfig& config, int64_t block) {
  const int index = static_cast<int>(block);  // a config has far fewer layers
  std::vector<LinearSlot> slots;
  AddAttention(config, index, &slots);
  if (IsMoeBlock(config, block)) {
    AddExperts(config, index, &slots);
  } else {
    AddMlp(config, index, &slots);
  }
  return slots;
}

std::vector<LinearSlot> AllSlots(const ModelConfig& config) {
  std::vector<LinearSlot> slots;
  for (int64_t block = 0; block < config.layers; ++block) {
    for (LinearSlot& slot : BlockSlots(config, block)) slots.push_back(std::move(slot));
  }
  return slots;
}

LinearSlot HeadSlot(const ModelConfig& config) {
  return {"lm_head", "head", config.vocab_size, config.hidden_size, false, 0, -1};
}

std::vector<TensorSpec> RequiredTensors(const ModelConfig& config) {
  std::vector<TensorSpec> specs;
  specs.push_back({"model.embed_tokens.weight", Shape{config.vocab_size, config.hidden_size}});
  for (int64_t block = 0; block < config.layers; ++block) AddBlock(config, block, &specs);
  specs.push_back({"model.norm.weight", Shape{config.hidden_size}});
  if (!config.tied_embeddings) AddLinear(HeadSlot(config), &specs);
  return specs;
}

}  // namespace quantmill
