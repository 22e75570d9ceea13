#include "core/checkpoint/quantization_config.h"

#include <algorithm>

#include "absl/strings/str_join.h"
#include "core/base/status.h"
#include "core/checkpoint/config_kinds.h"
#include "core/checkpoint/gguf_export.h"
#include "core/io/files.h"
#include "core/io/gguf_file.h"
#include "core/io/json.h"
#include "re2/re2.h"

namespace quantmill {

using Json = nlohmann::ordered_json;

namespace {

const std::vector<ConfigKind>& Kinds() {
  static const auto* const kinds = new std::vector<ConfigKind>{
      {"gptq", {"gptq", "gptq_v2"}, &ParseGptqConfig, &ComposeGptqConfig},
      {"compressed-tensors",
       {"compressed-tensors"},
       &ParseCompressedTensorsConfig,
       &ComposeCompressedTensorsConfig},
      {"awq", {"awq"}, &ParseAwqConfig, &ComposeAwqConfig},
      {"bitsandbytes", {"bitsandbytes"}, &ParseBitsAndBytesConfig, &ComposeBitsAndBytesConfig},
      {"hqq", {"hqq"}, &ParseHqqConfig, &ComposeHqqConfig},
      {"eetq", {"eetq"}, &ParseEetqConfig, &ComposeEetqConfig},
      {"aqlm", {"aqlm"}, &ParseAqlmConfig, &ComposeAqlmConfig},
      {kNativeTarget, {std::string(kNativeTarget)}, &ParseNativeConfig, &ComposeNativeConfig},
  };
  return *kinds;
}

}  // namespace

const std::vector<std::string>& CheckpointTargets() {
  static const auto* const targets = [] {
    auto* all = new std::vector<std::string>;
    for (const ConfigKind& kind : Kinds()) {
      all->insert(all->end(), kind.targets.begin(), kind.targets.end());
    }
    all->emplace_back(kGgufTarget);
    all->emplace_back(kDenseTarget);
    return all;
  }();
  return *targets;
}

absl::Status ConfigError(std::string_view key, std::string_view why) {
  return absl::InvalidArgumentError(
      absl::StrCat("quantization_config: '", std::string(key), "' ", std::string(why)));
}

std::vector<std::string> RoutersOf(const std::vector<SlotEntry>& slots) {
  std::vector<std::string> routers;
  for (const SlotEntry& slot : slots) {
    const size_t at = slot.name.find(".experts.");
    if (at == std::string::npos) continue;
    const std::string router = slot.name.substr(0, at) + ".gate";
    if (routers.empty() || routers.back() != router) routers.push_back(router);
  }
  return routers;
}

absl::StatusOr<bool> GetBool(const Json& json, const char* key, bool fallback) {
  const auto found = json.find(key);
  if (found == json.end() || found->is_null()) return fallback;
  if (!found->is_boolean()) return ConfigError(key, "must be true or false");
  return found->get<bool>();
}

absl::StatusOr<int64_t> GetInt(const Json& json, const char* key, int64_t fallback) {
  const auto found = json.find(key);
  if (found == json.end() || found->is_null()) return fallback;
  if (!found->is_number_integer()) return ConfigError(key, "must be an integer");
  return found->get<int64_t>();
}

absl::StatusOr<std::string> GetString(const Json& json, const char* key,
                                      const std::string& fallback) {
  const auto found = json.find(key);
  if (found == json.end() || found->is_null()) return fallback;
  if (!found->is_string()) return ConfigError(key, "must be a string");
  return found->get<std::string>();
}

absl::StatusOr<std::shared_ptr<const re2::RE2>> CompilePythonPattern(const std::string& pattern) {
  re2::RE2::Options options;
  options.set_log_errors(false);
  auto compiled = std::make_shared<re2::RE2>(pattern, options);
  if (!compiled->ok()) {
    return absl::UnimplementedError(
        ErrorText(absl::StrCat("quantization_config has the pattern '", pattern, "'"),
                  compiled->error(), "look-around and back references are not supported"));
  }
  return std::shared_ptr<const re2::RE2>(std::move(compiled));
}

bool MatchesAtStart(const re2::RE2& pattern, std::string_view name) {
  const re2::StringPiece text(name.data(), name.size());
  return pattern.Match(text, 0, text.size(), re2::RE2::ANCHOR_START, nullptr, 0);
}

absl::StatusOr<std::shared_ptr<const QuantizationConfig>> ParseQuantizationConfig(
    const Json& json) {
  if (!json.is_object()) {
    return absl::InvalidArgumentError("quantization_config must be a JSON object");
  }
  QM_ASSIGN_OR_RETURN(const std::string method, GetString(json, "quant_method", ""));
  if (method.empty()) return ConfigError("quant_method", "is missing");
  std::vector<std::string> known;
  for (const ConfigKind& kind : Kinds()) {
    if (kind.quant_method == method) return kind.parse(json);
    known.emplace_back(kind.quant_method);
  }
  return absl::UnimplementedError(
      ErrorText(absl::StrCat("the checkpoint is quantized with quant_method '", method, "'"),
                absl::StrCat("supported are ", absl::StrJoin(known, ", "))));
}

absl::StatusOr<std::shared_ptr<const QuantizationConfig>> ReadQuantizationConfig(
    const std::string& directory) {
  QM_ASSIGN_OR_RETURN(const std::string gguf, FindGguf(directory));
  if (!gguf.empty()) return ReadGgufQuantization(gguf);
  QM_ASSIGN_OR_RETURN(const Json config, ReadOrderedJson(directory + "/config.json"));
  if (config.is_object()) {
    const auto found = config.find("quantization_config");
    if (found != config.end() && !found->is_null()) {
      auto parsed = ParseQuantizationConfig(*found);
      if (!parsed.ok()) return WithContext(parsed.status(), directory + "/config.json");
      return parsed;
    }
  }
  for (const char* name : {"quantize_config.json", "quant_config.json"}) {
    const std::string path = directory + "/" + name;
    if (!FileExists(path)) continue;
    QM_ASSIGN_OR_RETURN(Json json, ReadOrderedJson(path));
    // Files of AutoGPTQ and AutoAWQ from before the key existed; only the latter have a version.
    if (json.is_object() && !json.contains("quant_method")) {
      json["quant_method"] = json.contains("version") ? "awq" : "gptq";
    }
    auto parsed = ParseQuantizationConfig(json);
    if (!parsed.ok()) return WithContext(parsed.status(), path);
    return parsed;
  }
  return std::shared_ptr<const QuantizationConfig>();
}

absl::StatusOr<Json> ComposeQuantizationConfig(std::string_view target,
                                               const std::vector<SlotEntry>& slots) {
  if (std::none_of(slots.begin(), slots.end(), [](const SlotEntry& s) { return s.packed; })) {
    return absl::InvalidArgumentError(
        "no linear is quantized, so there is nothing to describe; export as dense");
  }
  for (const ConfigKind& kind : Kinds()) {
    if (std::find(kind.targets.begin(), kind.targets.end(), target) != kind.targets.end()) {
      return kind.compose(target, slots);
    }
  }
  return absl::InvalidArgumentError(
      ErrorText(absl::StrCat("no checkpoint format '", std::string(target), "'"),
                absl::StrCat("known are ", absl::StrJoin(CheckpointTargets(), ", "))));
}

}  // namespace quantmill
