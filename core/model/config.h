// The architecture of a decoder, read from a Hugging Face config.json in its old (4.x) or new (5.x)
// spelling. Facts per architecture: transformers src/transformers/models/*/configuration_*.py.
#ifndef QUANTMILL_CORE_MODEL_CONFIG_H_
#define QUANTMILL_CORE_MODEL_CONFIG_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/tensor/dtype.h"
#include "nlohmann/json.hpp"

namespace quantmill {

enum class Architecture { kLlama, kMistral, kQwen2, kQwen3, kMixtral, kQwen3Moe };

struct RopeConfig {
  enum class Type { kDefault, kLinear, kLlama3 };
  Type type = Type::kDefault;
  double theta = 10000.0;
  double factor = 1.0;
  double low_freq_factor = 1.0;    // llama3
  double high_freq_factor = 4.0;   // llama3
  int64_t original_positions = 0;  // llama3: original_max_position_embeddings
};

struct ModelConfig {
  Architecture architecture = Architecture::kLlama;
  std::string model_type;  // as in the file
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;  // of dense MLPs (Mixtral: of experts)
  int64_t layers = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab_size = 0;
  int64_t max_positions = 0;
  double rms_norm_eps = 1e-6;
  RopeConfig rope;
  bool tied_embeddings = false;
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;                 // Qwen3: RMSNorm over head_dim before rope
  std::vector<int64_t> sliding_window;  // per layer; 0 = full attention
  // Mixture of experts; experts == 0 for dense models.
  int64_t experts = 0;
  int64_t experts_per_token = 0;
  int64_t expert_intermediate_size = 0;
  bool normalize_expert_weights = true;
  std::vector<bool> moe_layer;  // per layer: true = mixture of experts
  std::vector<int64_t> bos_ids, eos_ids;
  DType dtype = DType::kBF16;   // torch_dtype / dtype
  nlohmann::ordered_json json;  // the whole file, order kept, for writing it back

  int64_t q_features() const { return heads * head_dim; }
  int64_t kv_features() const { return kv_heads * head_dim; }
};

// Parses a config.json document. Names the key that is missing or wrong, and for an unknown
// model_type lists the supported ones.
absl::StatusOr<ModelConfig> ParseModelConfig(const nlohmann::ordered_json& json);
// Reads and parses DIRECTORY/config.json; of a GGUF file, or a directory with one, the metadata.
absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& directory);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_MODEL_CONFIG_H_
