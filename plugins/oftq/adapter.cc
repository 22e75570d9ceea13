// adapter_config.json of PEFT: written from the options, and read back into options. Keys and
// defaults: huggingface/peft 0.21.2, tuners/oft/config.py and tuners/lora/config.py.
#include <charconv>
#include <cmath>
#include <cstdio>
#include <string>
#include <string_view>

#include "oftq.h"
#include "quantmill/sdk/json.hpp"
#include "quantmill/sdk/plugin.hpp"

namespace quantmill::oftq {
namespace {

using qm::JsonObject;
using qm::JsonValue;
using Kind = JsonValue::Kind;

qm_status CheckTarget(qm_call* call, const char* target) {
  if (std::string_view(target) == "peft") return QM_OK;
  return qm::Fail(call, QM_UNIMPLEMENTED, "oftq has no adapters for '", target, "'; use peft");
}

// The shortest text that reads back as the same number.
std::string NumberText(double value) {
  char text[32];
  const auto [end, error] = std::to_chars(text, text + sizeof text, value);
  return error == std::errc() ? std::string(text, end) : std::string("0");
}

// ---- writing -----------------------------------------------------------------------------------

std::string OftConfig(const Options& o) {
  const bool series = o.neumann_terms != 0;
  return qm::StrCat(
      R"({"auto_mapping":null,"bias":"none","block_share":false,"coft":false,"eps":6e-05,)",
      R"("exclude_modules":null,"fan_in_fan_out":false,"inference_mode":true,"init_weights":true,)",
      R"("layers_pattern":null,"layers_to_transform":null,"module_dropout":0.0,)",
      R"("modules_to_save":null,"num_cayley_neumann_terms":)", series ? o.neumann_terms : 5,
      R"(,"oft_block_size":)", o.block, R"(,"peft_type":"OFT","r":0,"revision":null,)",
      R"("task_type":"CAUSAL_LM","use_cayley_neumann":)", series ? "true" : "false", "}");
}

std::string LoraConfig(const Options& o) {
  return qm::StrCat(
      R"({"alpha_pattern":{},"auto_mapping":null,"bias":"none","exclude_modules":null,)",
      R"("fan_in_fan_out":false,"inference_mode":true,"init_lora_weights":true,)",
      R"("layers_pattern":null,"layers_to_transform":null,"lora_alpha":)", NumberText(o.alpha),
      R"(,"lora_dropout":0.0,"modules_to_save":null,"peft_type":"LORA","r":)", o.rank,
      R"(,"rank_pattern":{},"revision":null,"task_type":"CAUSAL_LM","use_dora":false,)",
      R"("use_rslora":false})");
}

// ---- reading -----------------------------------------------------------------------------------

// The members of a configuration, with the defaults of a reader.
class Config {
 public:
  Config(qm_call* call, const JsonObject& members) : call_(call), members_(members) {}

  bool Has(const char* key) const { return Find(key) != nullptr; }

  qm_status Bool(const char* key, bool fallback, bool* out) const {
    const JsonValue* value = Find(key);
    *out = value == nullptr ? fallback : value->truth;
    if (value == nullptr || value->kind == Kind::kBool) return QM_OK;
    return Wrong(key, "true or false");
  }

  qm_status Number(const char* key, double fallback, double* out) const {
    const JsonValue* value = Find(key);
    *out = value == nullptr ? fallback : value->number;
    if (value == nullptr || value->kind == Kind::kNumber) return QM_OK;
    return Wrong(key, "a number");
  }

  qm_status Integer(const char* key, int64_t fallback, int64_t* out) const {
    double value = 0.0;
    QM_TRY(Number(key, static_cast<double>(fallback), &value));
    if (value != std::floor(value) || std::fabs(value) > 1e9) return Wrong(key, "an integer");
    *out = static_cast<int64_t>(value);
    return QM_OK;
  }

  // Refuses what changes the result and is not computed here. An absent key, null, false, "none",
  // {} and [] ask for nothing.
  qm_status Refuse(const char* key, const char* meaning) const {
    const JsonValue* value = Find(key);
    if (value == nullptr) return QM_OK;
    const bool asks =
        (value->kind == Kind::kBool && value->truth) ||
        (value->kind == Kind::kNumber && value->number != 0.0) ||
        (value->kind == Kind::kString && value->text != "none") ||
        ((value->kind == Kind::kList || value->kind == Kind::kObject) && !value->empty);
    if (!asks) return QM_OK;
    return qm::Fail(call_, QM_INVALID_ARGUMENT, "the adapter's configuration sets '", key, "' (",
                    meaning,
                    "), which is not supported; merge the adapter with PEFT and quantize "
                    "the result, or train one without it");
  }

  std::string Text(const char* key) const {
    const JsonValue* value = Find(key);
    return value != nullptr && value->kind == Kind::kString ? value->text : std::string();
  }

  qm_call* call() const { return call_; }

 private:
  // null counts as absent.
  const JsonValue* Find(const char* key) const {
    const auto found = members_.find(key);
    return found == members_.end() || found->second.kind == Kind::kNull ? nullptr : &found->second;
  }

  qm_status Wrong(const char* key, const char* expected) const {
    return qm::Fail(call_, QM_INVALID_ARGUMENT, "'", key,
                    "' of the adapter's configuration must be ", expected);
  }

  qm_call* call_;
  const JsonObject& members_;
};

// All options, so that none depends on who fills in defaults. Which linears have an adapter, its
// tensors say.
std::string OptionTexts(const Options& o) {
  return qm::StrCat(R"({"alpha":")", NumberText(o.alpha), R"(","block":")", o.block,
                    R"(","merge":"false","method":")", o.lora ? "lora" : "oft",
                    R"(","neumann_terms":")", o.neumann_terms, R"(","rank":")", o.rank,
                    R"(","target":"*"})");
}

qm_status RefuseForBoth(const Config& config) {
  QM_TRY(config.Refuse("bias", "trained biases"));
  QM_TRY(config.Refuse("fan_in_fan_out", "transposed weights"));
  QM_TRY(config.Refuse("modules_to_save", "modules trained as a whole"));
  return QM_OK;
}

// Whether "major.minor..." is before 0.18; an empty text is.
bool BeforeSeries(const std::string& version) {
  int major = 0, minor = 0;
  if (std::sscanf(version.c_str(), "%d.%d", &major, &minor) != 2) return true;
  return major == 0 && minor < 18;
}

qm_status ReadOft(const Config& config, std::string* options) {
  QM_TRY(RefuseForBoth(config));
  QM_TRY(config.Refuse("block_share", "one rotation for all blocks"));
  if (!config.Has("oft_block_size")) {
    return qm::Fail(config.call(), QM_INVALID_ARGUMENT,
                    "the adapter's configuration has no 'oft_block_size': PEFT before 0.14 wrote "
                    "another kind of OFT; train the adapter again");
  }
  int64_t block = 0, blocks = 0, terms = 0;
  bool series = true, projected = false;
  QM_TRY(config.Integer("oft_block_size", 32, &block));
  QM_TRY(config.Integer("r", 0, &blocks));
  QM_TRY(config.Integer("num_cayley_neumann_terms", 5, &terms));
  QM_TRY(config.Bool("use_cayley_neumann", true, &series));
  QM_TRY(config.Bool("coft", false, &projected));
  if (blocks != 0) {
    return qm::Fail(config.call(), QM_INVALID_ARGUMENT,
                    "the adapter's configuration has r = ", blocks,
                    " (a number of blocks) and oft_block_size = ", block,
                    block == 0 ? "; only adapters with one block size for all linears are supported"
                               : "; PEFT takes one of the two, and the other must be 0");
  }
  if (block < 2 || block > kMaxBlock) {
    return qm::Fail(config.call(), QM_INVALID_ARGUMENT, "oft_block_size is ", block,
                    "; rotations of 2 to ", kMaxBlock, " channels are supported");
  }
  if (series && (terms < 2 || terms > kMaxTerms)) {
    return qm::Fail(config.call(), QM_INVALID_ARGUMENT, "num_cayley_neumann_terms is ", terms,
                    "; 2 to ", kMaxTerms, " are supported (1 rotates nothing)");
  }
  if (series && BeforeSeries(config.Text("peft_version"))) {
    qm::Log(config.call(), qm::Severity::kWarning,
            "the adapter does not say that PEFT 0.18 or newer wrote it; before, another series "
            "was used, and results may differ");
  }
  if (projected) {
    qm::Log(config.call(), qm::Severity::kWarning,
            "the adapter was trained with 'coft': its numbers are taken as projected already");
  }
  Options found;
  found.block = block;
  found.neumann_terms = series ? terms : 0;
  *options = OptionTexts(found);
  return QM_OK;
}

// Initialisations that move the base weight: PEFT computes them again when it loads the adapter.
qm_status RefuseMovedBase(const Config& config) {
  const std::string start = config.Text("init_lora_weights");
  for (const std::string_view moves : {"pissa", "olora", "corda", "loftq", "lora_ga"}) {
    if (start.compare(0, moves.size(), moves) != 0) continue;
    return qm::Fail(config.call(), QM_INVALID_ARGUMENT, "the adapter was started with '", start,
                    "', which changes the base weights; convert it with PEFT "
                    "(path_initial_model_for_weight_conversion) to a plain LoRA first");
  }
  return QM_OK;
}

qm_status ReadLora(const Config& config, std::string* options) {
  QM_TRY(RefuseForBoth(config));
  QM_TRY(RefuseMovedBase(config));
  constexpr const char* kVariants[][2] = {
      {"use_dora", "directions and magnitudes apart"},
      {"use_qalora", "pooled inputs"},
      {"use_bdlora", "block-diagonal factors"},
      {"lora_bias", "trained biases"},
      {"rank_pattern", "other ranks for some linears"},
      {"alpha_pattern", "other scales for some linears"},
      {"target_parameters", "parameters outside of linears"},
      {"trainable_token_indices", "trained embeddings"},
      {"layer_replication", "repeated layers"},
      {"alora_invocation_tokens", "an adapter that starts at some token"},
      {"arrow_config", "routing between adapters"},
      {"kasa_config", "another factorization"},
      {"monteclora_config", "sampled factors"},
      {"velora_config", "compressed inputs"},
  };
  for (const auto& [key, meaning] : kVariants) QM_TRY(config.Refuse(key, meaning));
  int64_t rank = 0;
  double alpha = 0.0;
  bool root = false;
  QM_TRY(config.Integer("r", 8, &rank));
  QM_TRY(config.Number("lora_alpha", 8.0, &alpha));
  QM_TRY(config.Bool("use_rslora", false, &root));
  if (rank < 1 || rank > kMaxRank) {
    return qm::Fail(config.call(), QM_INVALID_ARGUMENT, "r is ", rank,
                    " in the adapter's configuration; ranks of 1 to ", kMaxRank, " are supported");
  }
  if (root) alpha *= std::sqrt(static_cast<double>(rank));  // alpha / sqrt(r) is the factor
  Options found;
  found.lora = true;
  found.rank = rank;
  found.alpha = alpha;
  *options = OptionTexts(found);
  return QM_OK;
}

}  // namespace

qm_status ToAdapter(qm_call* call, const char* target, const char** config_json) {
  QM_TRY(CheckTarget(call, target));
  Options options;
  QM_TRY(ReadOptions(call, &options));
  return qm::ScratchString(call, options.lora ? LoraConfig(options) : OftConfig(options),
                           "the description", config_json);
}

qm_status FromAdapter(qm_call* call, const char* target, const char* config_json,
                      const char** options_json) {
  QM_TRY(CheckTarget(call, target));
  JsonObject members;
  if (!qm::ParseJsonObject(config_json, qm::JsonUnicode::kReplace, &members)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT,
                    "the adapter's configuration is not a JSON object with distinct keys");
  }
  const Config config(call, members);
  const std::string type = config.Text("peft_type");
  std::string options;
  if (type == "OFT") {
    QM_TRY(ReadOft(config, &options));
  } else if (type == "LORA") {
    QM_TRY(ReadLora(config, &options));
  } else {
    return qm::Fail(call, QM_UNIMPLEMENTED, "the adapter's peft_type is '", type,
                    "'; oftq runs OFT and LORA");
  }
  return qm::ScratchString(call, options, "the options", options_json);
}

}  // namespace quantmill::oftq
