// quantization_config of HQQ files: transformers src/transformers/utils/quantization_config.py
// (HqqConfig) and src/transformers/integrations/hqq.py (linear tags).
//
// A linear is named by its tag, the path without "model", "layers" and numbers:
// "self_attn.q_proj". Parameters stand per tag or once for all; what counts are the fields stored
// with each linear, so the config only says which linears may be packed.
#include <algorithm>
#include <map>
#include <set>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "core/base/status.h"
#include "core/checkpoint/config_kinds.h"

namespace quantmill {
namespace {

using Json = nlohmann::ordered_json;

std::string LinearTag(std::string_view name) {
  std::vector<std::string> kept;
  for (const auto& part : absl::StrSplit(absl::string_view(name.data(), name.size()), '.')) {
    int64_t number = 0;
    if (part == "model" || part == "layers" || absl::SimpleAtoi(part, &number)) continue;
    kept.push_back(std::string(part));
  }
  return absl::StrJoin(kept, ".");
}

// Whether `part` is a run of whole components of `path`.
bool HasComponents(const std::string& path, const std::string& part) {
  return absl::StrCat(".", path, ".").find(absl::StrCat(".", part, ".")) != std::string::npos;
}

class HqqConfig : public QuantizationConfig {
 public:
  std::vector<std::string> skipped;
  std::map<std::string, std::string> by_tag;  // parameters; empty = `common` for all
  std::string common;

  std::string target() const override { return "hqq"; }

  absl::StatusOr<std::optional<SlotStorage>> Find(std::string_view slot) const override {
    const std::string name(slot), tag = LinearTag(slot);
    const bool skip = std::any_of(skipped.begin(), skipped.end(), [&](const std::string& entry) {
      return HasComponents(name, entry) || HasComponents(tag, entry);
    });
    const auto found = by_tag.find(tag);
    if (skip || (!by_tag.empty() && found == by_tag.end())) return std::optional<SlotStorage>();
    SlotStorage storage;
    storage.target = "hqq";
    storage.marker = "W_q";
    storage.config_json = by_tag.empty() ? common : found->second;
    storage.required = {"W_q", "scale", "zero", "shape", "nbits", "group_size", "axis"};
    storage.optional = {
        "packing",     "unpack_view_dtype",   "compute_dtype", "view_as_float",
        "quant_scale", "quant_zero",          "offload_meta",  "channel_wise",
        "optimize",    "stores_quant_config", "round_zero",    "encoded_state_dict"};
    return std::optional<SlotStorage>(std::move(storage));
  }
};

// {"axis":1,"group_size":64,"nbits":4} of one object of quant_config.
absl::StatusOr<std::string> ReadParameters(const Json& json) {
  const auto weights = json.is_object() ? json.find("weight_quant_params") : json.end();
  if (!json.is_object() || weights == json.end() || !weights->is_object()) {
    return ConfigError("quant_config", "must hold 'weight_quant_params'");
  }
  for (const char* key : {"scale_quant_params", "zero_quant_params"}) {
    if (json.contains(key) && !json[key].is_null()) {
      return absl::UnimplementedError(
          ErrorText(absl::StrCat("the HQQ checkpoint has ", key),
                    "scales and zero points that are quantized themselves are not supported"));
    }
  }
  const auto nbits = weights->find("nbits");
  if (nbits == weights->end() || !nbits->is_number()) {
    return ConfigError("nbits", "must be a number");
  }
  nlohmann::json parameters = {{"nbits", *nbits}};
  QM_ASSIGN_OR_RETURN(parameters["axis"], GetInt(*weights, "axis", 1));
  // null: one group for a whole row.
  QM_ASSIGN_OR_RETURN(parameters["group_size"], GetInt(*weights, "group_size", -1));
  return parameters.dump();
}

// The object transformers writes for one set of parameters.
absl::StatusOr<Json> WriteParameters(const std::string& text) {
  const auto parameters = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!parameters.is_object() || !parameters.contains("nbits") || !parameters.contains("axis") ||
      !parameters.contains("group_size")) {
    return absl::InternalError("per-layer HQQ parameters lack nbits, axis or group_size");
  }
  const Json weights = {{"nbits", parameters["nbits"]},
                        {"channel_wise", true},
                        {"group_size", parameters["group_size"]},
                        {"optimize", true},
                        {"round_zero", parameters["nbits"] == 4},
                        {"axis", parameters["axis"]},
                        {"view_as_float", false}};
  return Json{{"weight_quant_params", weights},
              {"scale_quant_params", nullptr},
              {"zero_quant_params", nullptr},
              {"offload_meta", false}};
}

// For each tag with a packed linear the parameters most of its linears have. FAILED_PRECONDITION if
// a tag is packed in one block and dense in another, which readers cannot load.
absl::StatusOr<std::map<std::string, std::string>> ByTag(const std::vector<SlotEntry>& slots,
                                                         std::vector<std::string>* dense) {
  std::map<std::string, std::map<std::string, int>> counts;
  for (const SlotEntry& slot : slots) {
    if (slot.packed) ++counts[LinearTag(slot.name)][slot.config_json];
  }
  for (const SlotEntry& slot : slots) {
    if (slot.packed) continue;
    const std::string tag = LinearTag(slot.name);
    if (counts.count(tag) > 0) {
      return absl::FailedPreconditionError(ErrorText(
          absl::StrCat(slot.name, " is dense, but other linears called ", tag, " are packed"),
          "hqq files leave linears out by this name, in all blocks alike",
          "quantize all of them or none, or export as quantmill"));
    }
    if (std::find(dense->begin(), dense->end(), tag) == dense->end()) dense->push_back(tag);
  }
  std::map<std::string, std::string> by_tag;
  for (const auto& [tag, settings] : counts) {
    by_tag[tag] =
        std::max_element(settings.begin(), settings.end(), [](const auto& a, const auto& b) {
          return a.second < b.second;
        })->first;
  }
  return by_tag;
}

}  // namespace

ConfigPointer ParseHqqConfig(const Json& json) {
  auto config = std::make_shared<HqqConfig>();
  const auto skipped = json.find("skip_modules");
  if (skipped != json.end() && !skipped->is_null()) {
    if (!skipped->is_array()) return ConfigError("skip_modules", "must be a list of names");
    for (const Json& entry : *skipped) {
      if (!entry.is_string()) return ConfigError("skip_modules", "must be a list of names");
      config->skipped.push_back(entry.get<std::string>());
    }
  } else {
    config->skipped = {"lm_head"};  // the reader's default
  }
  const auto parameters = json.find("quant_config");
  if (parameters == json.end() || !parameters->is_object() || parameters->empty()) {
    return ConfigError("quant_config", "must be an object");
  }
  if (parameters->contains("weight_quant_params")) {
    QM_ASSIGN_OR_RETURN(config->common, ReadParameters(*parameters));
    return std::shared_ptr<const QuantizationConfig>(std::move(config));
  }
  for (const auto& [tag, value] : parameters->items()) {
    QM_ASSIGN_OR_RETURN(config->by_tag[tag], ReadParameters(value));
  }
  return std::shared_ptr<const QuantizationConfig>(std::move(config));
}

absl::StatusOr<Json> ComposeHqqConfig(std::string_view, const std::vector<SlotEntry>& slots) {
  std::vector<std::string> dense;
  QM_ASSIGN_OR_RETURN(const auto by_tag, ByTag(slots, &dense));
  Json parameters = Json::object();
  const std::string& first = by_tag.begin()->second;
  const bool alike = std::all_of(by_tag.begin(), by_tag.end(),
                                 [&](const auto& entry) { return entry.second == first; });
  if (alike) {
    QM_ASSIGN_OR_RETURN(parameters, WriteParameters(first));
  } else {
    for (const auto& [tag, setting] : by_tag) {
      QM_ASSIGN_OR_RETURN(parameters[tag], WriteParameters(setting));
    }
  }
  return Json{{"quant_method", "hqq"}, {"skip_modules", dense}, {"quant_config", parameters}};
}

}  // namespace quantmill
