#include "core/model/gguf_config.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <optional>

#include "absl/strings/match.h"
#include "core/base/status.h"

namespace quantmill {
namespace {

using Json = nlohmann::ordered_json;

constexpr double kRopeTolerance = 1e-5;  // relative; divisors are stored in f32

// Writes keys of the metadata into config.json and remembers the first that is missing.
class Reader {
 public:
  Reader(const GgufHeader& header, const GgufModel& model) : header_(header), model_(model) {}

  const absl::Status& status() const { return status_; }

  std::optional<double> Find(const char* name) const {
    const GgufValue* value = header_.Find(GgufKey(model_, name));
    if (value == nullptr || value->numbers.empty()) return std::nullopt;
    return value->numbers[0];
  }

  int64_t Integer(const char* name, std::optional<int64_t> fallback = std::nullopt) {
    const std::optional<double> value = Find(name);
    if (value && *value >= 0 && *value <= INT32_MAX && *value == std::floor(*value)) {
      return static_cast<int64_t>(*value);
    }
    if (!value && fallback) return *fallback;
    Fail(name);
    return 1;
  }

  double Real(const char* name, std::optional<double> fallback = std::nullopt) {
    const std::optional<double> value = Find(name);
    if (value && std::isfinite(*value)) return Shortest(*value);
    if (!value && fallback) return *fallback;
    Fail(name);
    return 1;
  }

 private:
  // The shortest decimal that is this f32: 1e-5, not 9.9999997e-06.
  static double Shortest(double value) {
    for (int digits = 1; digits <= 9; ++digits) {
      char text[40];
      std::snprintf(text, sizeof text, "%.*g", digits, value);
      const double candidate = std::strtod(text, nullptr);
      if (static_cast<float>(candidate) == static_cast<float>(value)) return candidate;
    }
    return value;
  }

  void Fail(const char* name) {
    if (!status_.ok()) return;
    status_ = absl::InvalidArgumentError(
        ErrorText(absl::StrCat("key ", GgufKey(model_, name),
                               " of its metadata is missing or no valid number"),
                  "", "convert the model again"));
  }

  const GgufHeader& header_;
  const GgufModel& model_;
  absl::Status status_;
};

struct Kind {
  const char* architecture;  // GGUF
  const char* model_type;
  const char* class_name;
};
constexpr Kind kKinds[] = {{"llama", "llama", "LlamaForCausalLM"},
                           {"qwen2", "qwen2", "Qwen2ForCausalLM"},
                           {"qwen3", "qwen3", "Qwen3ForCausalLM"},
                           {"qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM"}};
constexpr Kind kMixtral = {"llama", "mixtral", "MixtralForCausalLM"};

const Kind& KindOf(const GgufModel& model) {
  if (model.mixtral()) return kMixtral;
  for (const Kind& kind : kKinds) {
    if (model.architecture == kind.architecture) return kind;
  }
  return kKinds[0];
}

// ---- rotary embeddings --------------------------------------------------------------------------

// Parameters of Llama 3 that give these divisors. Inside the blended range 1 / divisor is linear in
// 1 / wavelength, so low_freq_factor can be chosen (1, as in every published model) and the rest
// follows; with fewer than two frequencies in that range high_freq_factor is taken to be 4.
struct Llama3 {
  double factor = 1, low = 1, high = 4, original = 0;
};

double Wavelength(double theta, int64_t pair, int64_t pairs) {
  const double exponent = static_cast<double>(pair) / static_cast<double>(pairs);
  return 2.0 * std::numbers::pi * std::pow(theta, exponent);
}

// Whole numbers and common fractions are meant exactly.
double Rounded(double value) {
  const double nearest = std::round(value * 4.0) / 4.0;
  return std::abs(nearest - value) <= 1e-3 * std::abs(value) ? nearest : value;
}

std::optional<Llama3> FindLlama3(const std::vector<float>& divisors, double theta) {
  const auto pairs = static_cast<int64_t>(divisors.size());
  Llama3 found;
  found.factor = Rounded(*std::max_element(divisors.begin(), divisors.end()));
  double last_whole = 0, first_divided = 0;        // wavelengths at the ends of the blended range
  std::vector<std::pair<double, double>> blended;  // 1 / wavelength, share of the whole frequency
  for (int64_t i = 0; i < pairs; ++i) {
    const double wavelength = Wavelength(theta, i, pairs), divisor = divisors[i];
    if (std::abs(divisor - 1) < kRopeTolerance) {
      last_whole = wavelength;
    } else if (std::abs(divisor / found.factor - 1) < kRopeTolerance) {
      if (first_divided == 0) first_divided = wavelength;
    } else {
      blended.emplace_back(1 / wavelength,
                           (1 / divisor - 1 / found.factor) / (1 - 1 / found.factor));
    }
  }
  if (blended.size() >= 2) {
    const auto& [x0, t0] = blended.front();
    const auto& [x1, t1] = blended.back();
    const double slope = (t1 - t0) / (x1 - x0), offset = t0 - slope * x0;
    found.high = Rounded(1 - 1 / offset);
    found.original = std::round(slope * (found.high - found.low));
  } else if (blended.size() == 1) {
    found.original = std::round((blended[0].second * 3 + 1) / blended[0].first);
  } else {
    found.original = std::ceil(std::max(last_whole * found.high, first_divided / 2));
  }
  if (!(found.original >= 1 && found.original <= INT32_MAX && found.high > found.low)) {
    return std::nullopt;
  }
  return found;
}

absl::StatusOr<Json> RopeFromDivisors(const GgufFile& file, int64_t head_dim, double theta) {
  const GgufTensor& tensor = *file.header().FindTensor("rope_freqs.weight");
  const auto refuse = [](absl::string_view why) {
    return absl::UnimplementedError(ErrorText(absl::StrCat("tensor rope_freqs.weight ", why),
                                              "only the frequencies of Llama 3 are supported"));
  };
  if (!tensor.type->Is(GgmlType::kF32) || tensor.shape.size() != 1 ||
      tensor.shape[0] != head_dim / 2) {
    return refuse(absl::StrCat("is ", std::string(tensor.type->name), " ", tensor.ShapeText(),
                               ", not F32 [", head_dim / 2, "]"));
  }
  std::vector<float> divisors(static_cast<size_t>(tensor.shape[0]));
  std::memcpy(divisors.data(), file.data(tensor), tensor.bytes);
  for (const float divisor : divisors) {
    if (!(divisor >= 1.0f && divisor <= 1e6f)) return refuse("holds a value below 1 or no number");
  }
  const std::optional<Llama3> found = FindLlama3(divisors, theta);
  if (!found) return refuse("has unknown frequencies");
  ModelConfig config;
  config.head_dim = head_dim;
  config.rope = {RopeConfig::Type::kLlama3,
                 theta,
                 found->factor,
                 found->low,
                 found->high,
                 static_cast<int64_t>(found->original)};
  const std::vector<float> again = RopeDivisors(config);
  for (size_t i = 0; i < divisors.size(); ++i) {
    if (std::abs(again[i] / divisors[i] - 1) > kRopeTolerance) {
      return refuse("has frequencies that no parameters of Llama 3 give");
    }
  }
  return Json{{"rope_type", "llama3"},
              {"factor", found->factor},
              {"low_freq_factor", found->low},
              {"high_freq_factor", found->high},
              {"original_max_position_embeddings", config.rope.original_positions}};
}

absl::Status AddRope(const GgufFile& file, const GgufModel& model, Reader& reader, Json* config) {
  const GgufHeader& header = file.header();
  const double theta = reader.Real("rope.freq_base", 10000.0);
  const int64_t head_dim = (*config)["head_dim"].get<int64_t>();
  const int64_t rotated = reader.Integer("rope.dimension_count", head_dim);
  if (rotated != head_dim) {
    return absl::UnimplementedError(
        ErrorText(absl::StrCat("rope.dimension_count is ", rotated, " of ", head_dim),
                  "only whole heads can be rotated"));
  }
  (*config)["rope_theta"] = theta;
  const std::string type = header.Text(GgufKey(model, "rope.scaling.type"), "none");
  const double factor = reader.Real("rope.scaling.factor", reader.Real("rope.scale_linear", 1.0));
  if (type != "none" && type != "linear") {
    return absl::UnimplementedError(
        ErrorText(absl::StrCat("rope.scaling.type \"", type, "\" is not supported"),
                  "supported are none, linear and rope_freqs.weight of Llama 3"));
  }
  if (header.FindTensor("rope_freqs.weight") != nullptr) {
    QM_ASSIGN_OR_RETURN((*config)["rope_scaling"], RopeFromDivisors(file, head_dim, theta));
  } else if (factor != 1.0) {
    (*config)["rope_scaling"] = {{"rope_type", "linear"}, {"factor", factor}};
  }
  return absl::OkStatus();
}

// ---- the rest -----------------------------------------------------------------------------------

void AddExperts(const GgufModel& model, Reader& reader, Json* config) {
  if (model.experts == 0) return;
  (*config)["num_experts_per_tok"] = reader.Integer("expert_used_count");
  if (model.mixtral()) {
    (*config)["num_local_experts"] = model.experts;
    return;
  }
  (*config)["num_experts"] = model.experts;
  (*config)["moe_intermediate_size"] = reader.Integer("expert_feed_forward_length");
  (*config)["norm_topk_prob"] = true;  // llama.cpp's graph of qwen3moe has it built in
  (*config)["decoder_sparse_step"] = 1;
}

// Ends of text: the file's own, and the ends of turns that llama.cpp knows by their text
// (src/llama-vocab.cpp).
Json EndsOfText(const GgufHeader& header) {
  Json ids = Json::array();
  const auto add = [&ids](int64_t id) {
    if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  };
  for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"}) {
    const double id = header.Number(key, -1);
    if (id >= 0 && id <= INT32_MAX) add(static_cast<int64_t>(id));
  }
  const GgufValue* tokens = header.Find("tokenizer.ggml.tokens");
  const GgufValue* types = header.Find("tokenizer.ggml.token_type");
  constexpr double kControl = 3;
  for (size_t i = 0; tokens != nullptr && types != nullptr && i < tokens->strings.size(); ++i) {
    const std::string& text = tokens->strings[i];
    if (i >= types->numbers.size() || types->numbers[i] != kControl) continue;
    if (text == "<|im_end|>" || text == "<|eot_id|>") add(static_cast<int64_t>(i));
  }
  if (ids.size() == 1) return ids[0];
  return ids.empty() ? Json(nullptr) : ids;
}

// The type most of the weights have, among those a model can be stored in.
const char* DTypeText(const GgufHeader& header) {
  uint64_t f16 = 0, bf16 = 0, all = 0;
  for (const GgufTensor& tensor : header.tensors) {
    if (tensor.type->Is(GgmlType::kF16)) f16 += tensor.bytes;
    if (tensor.type->Is(GgmlType::kBF16)) bf16 += tensor.bytes;
    all += tensor.bytes;
  }
  if (f16 > all / 2) return "float16";
  return bf16 > all / 2 ? "bfloat16" : "float32";
}

}  // namespace

absl::StatusOr<Json> ConfigFromGguf(const GgufFile& file) {
  const GgufHeader& header = file.header();
  QM_ASSIGN_OR_RETURN(const GgufModel model, ReadGgufModel(header));
  Reader reader(header, model);
  const Kind& kind = KindOf(model);
  Json config = {{"architectures", {kind.class_name}}, {"model_type", kind.model_type}};
  config["hidden_size"] = reader.Integer("embedding_length");
  const bool only_experts = model.architecture == "qwen3moe";
  config["intermediate_size"] = reader.Integer(
      "feed_forward_length", only_experts ? std::optional<int64_t>(1) : std::nullopt);
  config["num_hidden_layers"] = reader.Integer("block_count");
  config["num_attention_heads"] = model.heads;
  config["num_key_value_heads"] = model.kv_heads;
  const int64_t hidden = config["hidden_size"].get<int64_t>();
  config["head_dim"] = reader.Integer("attention.key_length", hidden / model.heads);
  if (reader.Integer("attention.value_length", hidden / model.heads) != config["head_dim"]) {
    return absl::UnimplementedError("attention.key_length and attention.value_length differ");
  }
  config["hidden_act"] = "silu";
  config["max_position_embeddings"] = reader.Integer("context_length");
  config["rms_norm_eps"] = reader.Real("attention.layer_norm_rms_epsilon");
  QM_RETURN_IF_ERROR(reader.status());
  const GgufTensor* embedding = header.FindTensor("token_embd.weight");
  config["vocab_size"] =
      embedding != nullptr && !embedding->shape.empty() ? embedding->shape[0] : 1;
  config["tie_word_embeddings"] = header.FindTensor("output.weight") == nullptr;
  if (model.architecture != "qwen2" && !model.mixtral()) {
    config["attention_bias"] = header.FindTensor("blk.0.attn_q.bias") != nullptr;
  }
  if (model.architecture == "llama") {
    config["mlp_bias"] = header.FindTensor("blk.0.ffn_up.bias") != nullptr;
  }
  QM_RETURN_IF_ERROR(AddRope(file, model, reader, &config));
  AddExperts(model, reader, &config);
  const double bos = header.Number("tokenizer.ggml.bos_token_id", -1);
  config["bos_token_id"] =
      bos >= 0 && bos <= INT32_MAX ? Json(static_cast<int64_t>(bos)) : Json(nullptr);
  config["eos_token_id"] = EndsOfText(header);
  config["torch_dtype"] = DTypeText(header);
  QM_RETURN_IF_ERROR(reader.status());
  return config;
}

std::vector<float> RopeDivisors(const ModelConfig& config) {
  const RopeConfig& rope = config.rope;
  std::vector<float> divisors;
  if (rope.type != RopeConfig::Type::kLlama3) return divisors;
  const int64_t pairs = config.head_dim / 2;
  for (int64_t i = 0; i < pairs; ++i) {
    const double wavelength = Wavelength(rope.theta, i, pairs);
    const auto original = static_cast<double>(rope.original_positions);
    double divisor = 1;
    if (wavelength > original / rope.low_freq_factor) {
      divisor = rope.factor;
    } else if (wavelength >= original / rope.high_freq_factor) {
      const double blend = (original / wavelength - rope.low_freq_factor) /
                           (rope.high_freq_factor - rope.low_freq_factor);
      divisor = 1 / ((1 - blend) / rope.factor + blend);
    }
    divisors.push_back(static_cast<float>(divisor));
  }
  return divisors;
}

absl::StatusOr<GgufModel> GgufModelOf(const ModelConfig& config) {
  GgufModel model;
  model.heads = config.heads;
  model.kv_heads = config.kv_heads;
  model.experts = config.experts;
  switch (config.architecture) {
    case Architecture::kLlama:
    case Architecture::kMistral:
    case Architecture::kMixtral:
      model.architecture = "llama";
      break;
    case Architecture::kQwen2:
      model.architecture = "qwen2";
      break;
    case Architecture::kQwen3:
      model.architecture = "qwen3";
      break;
    case Architecture::kQwen3Moe:
      model.architecture = "qwen3moe";
      break;
  }
  return model;
}

absl::StatusOr<GgufMetadata> GgufConfig(const ModelConfig& config) {
  const auto refuse = [](absl::string_view what) {
    return absl::FailedPreconditionError(ErrorText(absl::StrCat("a GGUF file cannot hold ", what),
                                                   "llama.cpp would compute something else",
                                                   "export as quantmill or dense"));
  };
  for (const int64_t window : config.sliding_window) {
    if (window > 0 && window < config.max_positions) return refuse("a sliding window");
  }
  const bool all_sparse = std::all_of(config.moe_layer.begin(), config.moe_layer.end(),
                                      [](bool sparse) { return sparse; });
  if (config.experts > 0 && !all_sparse) return refuse("dense layers among layers with experts");
  if (config.architecture == Architecture::kQwen3Moe && !config.normalize_expert_weights) {
    return refuse("expert weights that are not normalized (norm_topk_prob: false)");
  }
  QM_ASSIGN_OR_RETURN(const GgufModel model, GgufModelOf(config));
  GgufMetadata metadata = {{"general.architecture", GgufValue::Text(model.architecture)},
                           {"general.type", GgufValue::Text("model")},
                           {"general.name", GgufValue::Text(config.model_type)}};
  const auto add = [&](const char* name, GgufValue value) {
    metadata.emplace_back(GgufKey(model, name), std::move(value));
  };
  add("vocab_size", GgufValue::U32(config.vocab_size));
  add("context_length", GgufValue::U32(config.max_positions));
  add("embedding_length", GgufValue::U32(config.hidden_size));
  add("block_count", GgufValue::U32(config.layers));
  add("feed_forward_length", GgufValue::U32(config.intermediate_size));
  add("attention.head_count", GgufValue::U32(config.heads));
  add("attention.head_count_kv", GgufValue::U32(config.kv_heads));
  add("attention.key_length", GgufValue::U32(config.head_dim));
  add("attention.value_length", GgufValue::U32(config.head_dim));
  add("attention.layer_norm_rms_epsilon", GgufValue::F32(config.rms_norm_eps));
  add("rope.dimension_count", GgufValue::U32(config.head_dim));
  add("rope.freq_base", GgufValue::F32(config.rope.theta));
  if (config.rope.type == RopeConfig::Type::kLinear) {
    add("rope.scaling.type", GgufValue::Text("linear"));
    add("rope.scaling.factor", GgufValue::F32(config.rope.factor));
  }
  if (config.experts > 0) {
    add("expert_count", GgufValue::U32(config.experts));
    add("expert_used_count", GgufValue::U32(config.experts_per_token));
    if (!model.mixtral()) {
      add("expert_feed_forward_length", GgufValue::U32(config.expert_intermediate_size));
    }
  }
  return metadata;
}

}  // namespace quantmill
