#include "tests/core/model/random_model.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace quantmill::testing {
namespace {

// Numerical Recipes' 64-bit linear congruential generator: enough for test weights.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
  // Uniform in [-1, 1).
  float Next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<double>(state_ >> 11) * 0x1p-52 - 1.0);
  }

 private:
  uint64_t state_;
};

}  // namespace

nlohmann::ordered_json SmallConfig(const std::string& model_type,
                                   const nlohmann::ordered_json& changes) {
  nlohmann::ordered_json config = {{"model_type", model_type},
                                   {"hidden_size", 32},
                                   {"intermediate_size", 48},
                                   {"num_hidden_layers", 2},
                                   {"num_attention_heads", 4},
                                   {"num_key_value_heads", 2},
                                   {"head_dim", 16},
                                   {"hidden_act", "silu"},
                                   {"vocab_size", 64},
                                   {"max_position_embeddings", 128},
                                   {"rms_norm_eps", 1e-5},
                                   {"rope_theta", 10000.0},
                                   {"tie_word_embeddings", false},
                                   {"bos_token_id", 1},
                                   {"eos_token_id", 2},
                                   {"torch_dtype", "float32"}};
  if (!changes.is_null()) config.update(changes);
  // As from a file: parsed numbers are unsigned, literals of this program signed.
  return nlohmann::ordered_json::parse(config.dump());
}

LinearWeight MemorySource::Linear(const std::string& module) const {
  LinearWeight weight;
  weight.dense = tensors_.at(module + ".weight");
  const auto bias = tensors_.find(module + ".bias");
  if (bias != tensors_.end()) weight.bias = bias->second;
  return weight;
}

absl::StatusOr<BlockWeights> MemorySource::LoadBlock(int64_t block, Backend&) {
  const std::string name = BlockName(block);
  BlockWeights weights;
  weights.input_norm = tensors_.at(name + ".input_layernorm.weight");
  weights.post_attention_norm = tensors_.at(name + ".post_attention_layernorm.weight");
  if (config_.qk_norm) {
    weights.q_norm = tensors_.at(name + ".self_attn.q_norm.weight");
    weights.k_norm = tensors_.at(name + ".self_attn.k_norm.weight");
  }
  if (config_.moe_layer[static_cast<size_t>(block)]) {
    weights.moe.router = Linear(RouterName(config_, block));
    weights.moe.experts.resize(static_cast<size_t>(config_.experts));
  }
  for (const LinearSlot& slot : BlockSlots(config_, block)) {
    *weights.At(slot) = Linear(slot.name);
  }
  return weights;
}

absl::StatusOr<LinearWeight> MemorySource::Head(Backend&) {
  return Linear(config_.tied_embeddings ? "model.embed_tokens" : "lm_head");
}

NamedMatrices MemorySource::Matrices() const {
  NamedMatrices matrices;
  for (const auto& [name, tensor] : tensors_) {
    const int64_t columns = tensor.dim(tensor.rank() - 1);
    Matrix& matrix = matrices[name];
    for (int64_t begin = 0; begin < tensor.elements(); begin += columns) {
      const float* row = tensor.as<float>() + begin;
      matrix.emplace_back(row, row + columns);
    }
  }
  return matrices;
}

std::unique_ptr<MemorySource> MakeRandomModel(const nlohmann::ordered_json& json, uint64_t seed) {
  ModelConfig config = ParseModelConfig(json).value();
  Random random(seed);
  std::map<std::string, Tensor> tensors;
  for (const TensorSpec& spec : RequiredTensors(config)) {
    const bool matrix = spec.shape.rank() == 2;
    const bool bias = spec.name.ends_with(".bias");
    const float scale =
        matrix ? 2.0f / std::sqrt(static_cast<float>(spec.shape[1])) : (bias ? 0.2f : 0.3f);
    std::vector<float> values(static_cast<size_t>(spec.shape.elements()));
    for (float& value : values) value = scale * random.Next() + (matrix || bias ? 0.0f : 1.0f);
    tensors[spec.name] = Tensor::FromF32(spec.shape, values);
  }
  return std::make_unique<MemorySource>(std::move(config), std::move(tensors));
}

std::vector<int32_t> RandomIds(int64_t count, int64_t vocab, uint64_t seed) {
  Random random(seed);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i) {
    const double share = (static_cast<double>(random.Next()) + 1.0) / 2;
    ids.push_back(static_cast<int32_t>(
        std::min(share * static_cast<double>(vocab), static_cast<double>(vocab - 1))));
  }
  return ids;
}

}  // namespace quantmill::testing
