#include "core/model/config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <optional>
#include <string_view>
#include <utility>

#include "absl/strings/match.h"
#include "core/base/status.h"
#include "core/io/gguf_file.h"
#include "core/io/json.h"
#include "core/model/gguf_config.h"

namespace quantmill {
namespace {

using Json = nlohmann::ordered_json;

// What a configuration class of transformers assumes for keys that a file leaves out
// (src/transformers/models/*/configuration_*.py).
struct ClassDefaults {
  const char* model_type;
  Architecture architecture;
  double eps;
  int64_t kv_heads;  // 0: as many as heads
  int64_t max_positions;
  double theta;
  int64_t head_dim;  // 0: hidden size / heads
  bool bos_eos;      // ids 1 and 2
};
constexpr std::array<ClassDefaults, 6> kClasses = {{
    {"llama", Architecture::kLlama, 1e-6, 0, 2048, 1e4, 0, true},
    {"mistral", Architecture::kMistral, 1e-6, 8, 131072, 1e4, 0, true},
    {"qwen2", Architecture::kQwen2, 1e-6, 32, 32768, 1e4, 0, false},
    {"qwen3", Architecture::kQwen3, 1e-6, 32, 32768, 1e4, 128, false},
    {"mixtral", Architecture::kMixtral, 1e-5, 8, 131072, 1e6, 0, true},
    {"qwen3_moe", Architecture::kQwen3Moe, 1e-6, 4, 32768, 1e4, 0, false},
}};

constexpr int64_t kMaxSize = INT32_MAX;  // keeps products of two sizes in 64 bits
constexpr int64_t kMaxLayers = 100'000;

// A whole number from 0 to kMaxSize.
bool IsIndex(const Json& json) { return json.is_number_integer() && json >= 0 && json <= kMaxSize; }

// Reads keys of one object. The first mistake is kept and later reads return defaults, so that a
// sequence of reads needs one check at its end.
class Fields {
 public:
  Fields(const Json& json, std::string path) : json_(json), path_(std::move(path)) {}

  const absl::Status& status() const { return status_; }

  void Fail(absl::string_view key, absl::string_view why, absl::string_view remedy = "") {
    if (!status_.ok()) return;
    status_ = absl::InvalidArgumentError(
        ErrorText(absl::StrCat("config.json: ", path_, key, " ", why),
                  remedy.empty() ? "this model cannot be opened" : remedy));
  }

  // Null if the key is absent or null.
  const Json* Find(const char* key) const {
    const auto found = json_.find(key);
    return found == json_.end() || found->is_null() ? nullptr : &*found;
  }
  bool HasKey(const char* key) const { return json_.contains(key); }

  int64_t Integer(const char* key, std::optional<int64_t> fallback, int64_t lowest,
                  int64_t highest) {
    const Json* value = Find(key);
    if (value == nullptr) {
      if (!fallback.has_value()) Fail(key, "is missing");
      return fallback.value_or(lowest);
    }
    if (!value->is_number_integer()) {
      Fail(key, absl::StrCat("is ", Show(*value), ", not a whole number"));
      return lowest;
    }
    if (*value < lowest || *value > highest) {
      Fail(key, absl::StrCat("is ", Show(*value), "; it must be ", lowest, " to ", highest));
      return lowest;
    }
    return value->get<int64_t>();
  }

  int64_t Size(const char* key, std::optional<int64_t> fallback = std::nullopt) {
    return Integer(key, fallback, 1, kMaxSize);
  }

  double Positive(const char* key, std::optional<double> fallback) {
    const Json* value = Find(key);
    if (value == nullptr) {
      if (!fallback.has_value()) Fail(key, "is missing");
      return fallback.value_or(1.0);
    }
    if (!value->is_number() || !std::isfinite(value->get<double>()) || value->get<double>() <= 0) {
      Fail(key, absl::StrCat("is ", Show(*value), ", not a positive number"));
      return 1.0;
    }
    return value->get<double>();
  }

  bool Flag(const char* key, bool fallback) {
    const Json* value = Find(key);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) {
      Fail(key, absl::StrCat("is ", Show(*value), ", not true or false"));
      return fallback;
    }
    return value->get<bool>();
  }

  std::string Text(const char* key, const std::string& fallback) {
    const Json* value = Find(key);
    if (value == nullptr) return fallback;
    if (!value->is_string()) {
      Fail(key, absl::StrCat("is ", Show(*value), ", not a string"));
      return fallback;
    }
    return value->get<std::string>();
  }

  // A token id, a list of them, or null.
  std::vector<int64_t> Ids(const char* key, std::vector<int64_t> fallback) {
    if (!HasKey(key)) return fallback;
    const Json* value = Find(key);
    if (value == nullptr) return {};
    std::vector<int64_t> ids;
    for (const Json& id : value->is_array() ? *value : Json::array({*value})) {
      if (!IsIndex(id)) {
        Fail(key, absl::StrCat("is ", Show(*value), ", not a token id or a list of them"));
        return {};
      }
      ids.push_back(id.get<int64_t>());
    }
    return ids;
  }

 private:
  // Short enough for a message whatever the file holds.
  static std::string Show(const Json& value) {
    std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
    if (text.size() > 60) text = text.substr(0, 57) + "...";
    return text;
  }

  const Json& json_;
  std::string path_;
  absl::Status status_;
};

absl::StatusOr<const ClassDefaults*> FindClass(const std::string& model_type) {
  std::string known;
  for (const ClassDefaults& row : kClasses) {
    if (model_type == row.model_type) return &row;
    absl::StrAppend(&known, known.empty() ? "" : ", ", row.model_type);
  }
  return absl::UnimplementedError(
      ErrorText(absl::StrCat("config.json: model_type \"", model_type, "\" is not supported"),
                absl::StrCat("supported are ", known)));
}

void ReadSizes(const ClassDefaults& defaults, Fields& fields, ModelConfig* config) {
  config->hidden_size = fields.Size("hidden_size");
  config->intermediate_size = fields.Size("intermediate_size");
  config->layers = fields.Integer("num_hidden_layers", std::nullopt, 1, kMaxLayers);
  config->heads = fields.Size("num_attention_heads");
  config->vocab_size = fields.Size("vocab_size");
  config->max_positions = fields.Size("max_position_embeddings", defaults.max_positions);
  config->rms_norm_eps = fields.Positive("rms_norm_eps", defaults.eps);
  // A key that says null means as many as heads; a missing one means the class's default.
  const bool as_heads = fields.HasKey("num_key_value_heads") || defaults.kv_heads == 0;
  config->kv_heads =
      fields.Size("num_key_value_heads", as_heads ? config->heads : defaults.kv_heads);
  const bool divided = fields.HasKey("head_dim") || defaults.head_dim == 0;
  if (divided && fields.Find("head_dim") == nullptr && config->hidden_size % config->heads != 0) {
    fields.Fail("hidden_size", absl::StrCat("is ", config->hidden_size, ", which ", config->heads,
                                            " heads do not divide, and there is no head_dim"));
  }
  config->head_dim =
      fields.Size("head_dim", divided ? std::max<int64_t>(1, config->hidden_size / config->heads)
                                      : defaults.head_dim);
  if (config->heads % config->kv_heads != 0) {
    fields.Fail("num_attention_heads",
                absl::StrCat("is ", config->heads, ", not a multiple of num_key_value_heads ",
                             config->kv_heads));
  }
  if (config->head_dim % 2 != 0) {
    fields.Fail("head_dim", absl::StrCat("is ", config->head_dim,
                                         ", but rotary embeddings need an even number"));
  }
}

void ReadFlags(Fields& fields, ModelConfig* config) {
  const std::string activation = fields.Text("hidden_act", "silu");
  if (activation != "silu") {
    fields.Fail("hidden_act", absl::StrCat("is \"", activation, "\"; only silu is supported"));
  }
  config->tied_embeddings = fields.Flag("tie_word_embeddings", false);
  const bool attention_bias = fields.Flag("attention_bias", false);
  switch (config->architecture) {
    case Architecture::kLlama:
      config->qkv_bias = config->o_bias = attention_bias;
      config->mlp_bias = fields.Flag("mlp_bias", false);
      break;
    case Architecture::kQwen2:
      config->qkv_bias = true;
      break;
    case Architecture::kQwen3:
    case Architecture::kQwen3Moe:
      config->qkv_bias = config->o_bias = attention_bias;
      config->qk_norm = true;
      break;
    case Architecture::kMistral:
    case Architecture::kMixtral:
      break;
  }
}

void ReadDType(Fields& fields, ModelConfig* config) {
  const char* key = fields.Find("dtype") != nullptr ? "dtype" : "torch_dtype";
  std::string name = fields.Text(key, "bfloat16");
  if (absl::StartsWith(name, "torch.")) name = name.substr(6);
  if (name == "bfloat16" || name == "auto") {
    config->dtype = DType::kBF16;
  } else if (name == "float16") {
    config->dtype = DType::kF16;
  } else if (name == "float32") {
    config->dtype = DType::kF32;
  } else {
    fields.Fail(key,
                absl::StrCat("is \"", name, "\"; bfloat16, float16 and float32 are supported"));
  }
}

// ---- rotary embeddings

absl::Status ReadLlama3Rope(Fields& rope, Fields& top, RopeConfig* config) {
  config->factor = rope.Positive("factor", std::nullopt);
  config->low_freq_factor = rope.Positive("low_freq_factor", std::nullopt);
  config->high_freq_factor = rope.Positive("high_freq_factor", std::nullopt);
  const char* key = "original_max_position_embeddings";
  Fields& place = rope.Find(key) == nullptr && top.Find(key) != nullptr ? top : rope;
  config->original_positions = place.Size(key);
  if (config->high_freq_factor <= config->low_freq_factor) {
    rope.Fail("high_freq_factor", "is not larger than low_freq_factor");
  }
  QM_RETURN_IF_ERROR(rope.status());
  return top.status();
}

// `json` holds rope_type (older: type) and the fields of that type.
absl::Status ReadRopeObject(const Json& json, const std::string& path, Fields& top,
                            RopeConfig* config) {
  if (!json.is_object()) {
    top.Fail(path, "is not an object");
    return top.status();
  }
  Fields rope(json, path + ".");
  config->theta = rope.Positive("rope_theta", config->theta);
  const std::string type = rope.Text("rope_type", rope.Text("type", "default"));
  if (rope.Positive("partial_rotary_factor", 1.0) != 1.0) {
    rope.Fail("partial_rotary_factor", "is not 1; only whole heads can be rotated");
  }
  QM_RETURN_IF_ERROR(rope.status());
  if (type == "default") {
    config->type = RopeConfig::Type::kDefault;
  } else if (type == "linear") {
    config->type = RopeConfig::Type::kLinear;
    config->factor = rope.Positive("factor", std::nullopt);
  } else if (type == "llama3") {
    config->type = RopeConfig::Type::kLlama3;
    return ReadLlama3Rope(rope, top, config);
  } else {
    return absl::UnimplementedError(
        ErrorText(absl::StrCat("config.json: ", path, ".rope_type \"", type, "\" is not supported"),
                  "supported are default, linear and llama3"));
  }
  return rope.status();
}

// One dictionary per kind of layer ({"full_attention": {...}, ...}) is fine if all say the same.
absl::StatusOr<const Json*> SameForAllLayers(const Json& json) {
  const Json* first = nullptr;
  for (const auto& [kind, value] : json.items()) {
    if (!absl::EndsWith(kind, "_attention") || !value.is_object()) return &json;
    if (first != nullptr && *first != value) {
      return absl::UnimplementedError(
          ErrorText("config.json: rope_parameters differ between kinds of layers",
                    "one setting for all layers is supported"));
    }
    first = &value;
  }
  return first == nullptr ? &json : first;
}

// transformers 5 writes rope_parameters, 4 writes rope_theta and rope_scaling.
absl::Status ReadRope(const ClassDefaults& defaults, Fields& fields, RopeConfig* config) {
  config->theta = fields.Positive("rope_theta", defaults.theta);
  QM_RETURN_IF_ERROR(fields.status());
  if (const Json* parameters = fields.Find("rope_parameters")) {
    if (!parameters->is_object()) {
      fields.Fail("rope_parameters", "is not an object");
      return fields.status();
    }
    QM_ASSIGN_OR_RETURN(const Json* shared, SameForAllLayers(*parameters));
    return ReadRopeObject(*shared, "rope_parameters", fields, config);
  }
  if (const Json* scaling = fields.Find("rope_scaling")) {
    return ReadRopeObject(*scaling, "rope_scaling", fields, config);
  }
  return absl::OkStatus();
}

// ---- sliding windows

// The window that layers with sliding attention have; 0 = none has.
int64_t WindowSize(Fields& fields, const ModelConfig& config) {
  const bool null_is_off = fields.HasKey("sliding_window");
  switch (config.architecture) {
    case Architecture::kLlama:
      return 0;
    case Architecture::kMistral:
      return fields.Size("sliding_window", null_is_off ? 0 : 4096);
    case Architecture::kMixtral:
      return fields.Size("sliding_window", 0);
    case Architecture::kQwen2:
    case Architecture::kQwen3:
    case Architecture::kQwen3Moe:
      if (!fields.Flag("use_sliding_window", false)) return 0;
      return fields.Size("sliding_window", null_is_off ? 0 : 4096);
  }
  return 0;
}

// First layer with a window, where the file has no layer_types.
int64_t FirstWindowLayer(Fields& fields, const ModelConfig& config) {
  switch (config.architecture) {
    case Architecture::kQwen2:
    case Architecture::kQwen3:
      return fields.Integer("max_window_layers", 28, 0, kMaxSize);
    case Architecture::kQwen3Moe:
      return fields.Integer("max_window_layers", 0, 0, kMaxSize);
    default:
      return 0;
  }
}

void ReadWindows(Fields& fields, ModelConfig* config) {
  const int64_t window = WindowSize(fields, *config);
  const int64_t first = FirstWindowLayer(fields, *config);
  config->sliding_window.assign(static_cast<size_t>(config->layers), 0);
  const Json* types = fields.Find("layer_types");
  if (types == nullptr) {
    for (int64_t layer = first; layer < config->layers; ++layer) {
      config->sliding_window[static_cast<size_t>(layer)] = window;
    }
    return;
  }
  if (!types->is_array() || types->size() != static_cast<size_t>(config->layers)) {
    fields.Fail("layer_types",
                absl::StrCat("is not a list of ", config->layers, " entries, one per layer"));
    return;
  }
  for (size_t layer = 0; layer < types->size(); ++layer) {
    const Json& type = (*types)[layer];
    if (type == "full_attention") continue;
    if (type != "sliding_attention") {
      fields.Fail("layer_types", absl::StrCat("has an unsupported entry for layer ", layer,
                                              "; full_attention and sliding_attention are known"));
      return;
    }
    if (window == 0) {
      fields.Fail("layer_types", "asks for sliding attention, but there is no sliding_window");
      return;
    }
    config->sliding_window[layer] = window;
  }
}

// ---- mixture of experts

// Layers of Qwen3-MoE that are dense.
std::vector<bool> SparseLayers(Fields& fields, int64_t layers) {
  const int64_t step = fields.Size("decoder_sparse_step", 1);
  std::vector<bool> sparse(static_cast<size_t>(layers));
  for (int64_t i = 0; i < layers; ++i) sparse[static_cast<size_t>(i)] = (i + 1) % step == 0;
  const Json* dense = fields.Find("mlp_only_layers");
  if (dense == nullptr) return sparse;
  if (!dense->is_array()) {
    fields.Fail("mlp_only_layers", "is not a list of layers");
    return sparse;
  }
  for (const Json& layer : *dense) {
    if (!IsIndex(layer)) {
      fields.Fail("mlp_only_layers", "is not a list of layers");
      return sparse;
    }
    const size_t index = layer.get<size_t>();
    if (index < sparse.size()) sparse[index] = false;
  }
  return sparse;
}

void ReadExperts(Fields& fields, ModelConfig* config) {
  config->moe_layer.assign(static_cast<size_t>(config->layers), false);
  if (config->architecture == Architecture::kMixtral) {
    config->experts = fields.Size("num_local_experts");
    config->experts_per_token = fields.Size("num_experts_per_tok", 2);
    config->expert_intermediate_size = config->intermediate_size;
    config->moe_layer.assign(static_cast<size_t>(config->layers), true);
  } else if (config->architecture == Architecture::kQwen3Moe) {
    const char* key = fields.Find("num_experts") != nullptr ? "num_experts" : "num_local_experts";
    config->experts = fields.Size(key);
    config->experts_per_token = fields.Size("num_experts_per_tok", 8);
    config->expert_intermediate_size = fields.Size("moe_intermediate_size", 768);
    config->normalize_expert_weights = fields.Flag("norm_topk_prob", false);
    config->moe_layer = SparseLayers(fields, config->layers);
  }
  if (config->experts_per_token > config->experts) {
    fields.Fail("num_experts_per_tok",
                absl::StrCat("is ", config->experts_per_token, ", more than the ", config->experts,
                             " experts"));
  }
}

absl::StatusOr<ModelConfig> ReadGgufConfig(const std::string& path) {
  QM_ASSIGN_OR_RETURN(const auto file, GgufFile::Open(path));
  const absl::StatusOr<Json> json = ConfigFromGguf(*file);
  if (!json.ok()) return WithContext(json.status(), absl::StrCat("cannot open model ", path));
  absl::StatusOr<ModelConfig> config = ParseModelConfig(*json);
  if (!config.ok()) return WithContext(config.status(), absl::StrCat("cannot open model ", path));
  return config;
}

}  // namespace

absl::StatusOr<ModelConfig> ParseModelConfig(const nlohmann::ordered_json& json) {
  if (!json.is_object()) {
    return absl::InvalidArgumentError(ErrorText("config.json is not a JSON object"));
  }
  Fields fields(json, "");
  ModelConfig config;
  config.model_type = fields.Text("model_type", "");
  if (config.model_type.empty()) fields.Fail("model_type", "is missing");
  QM_RETURN_IF_ERROR(fields.status());
  QM_ASSIGN_OR_RETURN(const ClassDefaults* defaults, FindClass(config.model_type));
  config.architecture = defaults->architecture;
  ReadSizes(*defaults, fields, &config);
  ReadFlags(fields, &config);
  ReadDType(fields, &config);
  QM_RETURN_IF_ERROR(fields.status());
  QM_RETURN_IF_ERROR(ReadRope(*defaults, fields, &config.rope));
  ReadWindows(fields, &config);
  ReadExperts(fields, &config);
  using Ids = std::vector<int64_t>;
  config.bos_ids = fields.Ids("bos_token_id", defaults->bos_eos ? Ids{1} : Ids{});
  config.eos_ids = fields.Ids("eos_token_id", defaults->bos_eos ? Ids{2} : Ids{});
  QM_RETURN_IF_ERROR(fields.status());
  config.json = json;
  return config;
}

absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& directory) {
  QM_ASSIGN_OR_RETURN(const std::string gguf, FindGguf(directory));
  if (!gguf.empty()) return ReadGgufConfig(gguf);
  const std::string path = (std::filesystem::path(directory) / "config.json").string();
  QM_ASSIGN_OR_RETURN(const Json json, ReadOrderedJson(path));
  absl::StatusOr<ModelConfig> config = ParseModelConfig(json);
  if (!config.ok()) {
    return WithContext(config.status(), absl::StrCat("cannot open model ", directory));
  }
  return config;
}

}  // namespace quantmill
