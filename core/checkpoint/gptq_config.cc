// quantization_config of GPTQ files: keys, aliases and defaults of gptqmodel/quantization/config.py
// and transformers src/transformers/utils/quantization_config.py.
#include <algorithm>
#include <map>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "core/base/status.h"
#include "core/checkpoint/config_kinds.h"
#include "re2/re2.h"

namespace quantmill {
namespace {

using Json = nlohmann::ordered_json;

struct Setting {
  int64_t bits = 0;
  int64_t group_size = 128;
  bool desc_act = false;
  bool sym = true;

  std::string ToJson() const {
    const nlohmann::json json = {
        {"bits", bits}, {"desc_act", desc_act}, {"group_size", group_size}, {"sym", sym}};
    return json.dump();
  }
};

// Overrides what `json` names, under its own names or their older aliases.
absl::Status ReadSetting(const Json& json, Setting* setting) {
  for (const char* key : {"bits", "wbits", "w_bit"}) {
    QM_ASSIGN_OR_RETURN(setting->bits, GetInt(json, key, setting->bits));
  }
  for (const char* key : {"group_size", "q_group_size"}) {
    QM_ASSIGN_OR_RETURN(setting->group_size, GetInt(json, key, setting->group_size));
  }
  QM_ASSIGN_OR_RETURN(setting->desc_act, GetBool(json, "desc_act", setting->desc_act));
  QM_ASSIGN_OR_RETURN(setting->sym, GetBool(json, "sym", setting->sym));
  return absl::OkStatus();
}

absl::Status CheckSetting(const Setting& setting) {
  if (setting.bits == 0) return ConfigError("bits", "is missing");
  if (setting.bits != 2 && setting.bits != 3 && setting.bits != 4 && setting.bits != 8) {
    return ConfigError("bits", absl::StrCat("is ", setting.bits, "; it must be 2, 3, 4 or 8"));
  }
  if (setting.group_size != -1 && setting.group_size < 1) {
    return ConfigError("group_size",
                       absl::StrCat("is ", setting.group_size, "; it must be -1 or positive"));
  }
  return absl::OkStatus();
}

struct Rule {
  std::shared_ptr<const re2::RE2> pattern;
  bool dense = false;
  Setting setting;
};

class GptqConfig : public QuantizationConfig {
 public:
  std::string target_name;
  Setting common;
  std::vector<Rule> rules;
  std::set<std::string> modules;  // suffixes below the block; empty = all
  bool lm_head = false;

  std::string target() const override { return target_name; }

  absl::StatusOr<std::optional<SlotStorage>> Find(std::string_view slot) const override {
    if (slot == "lm_head" && !lm_head) return std::optional<SlotStorage>();
    if (!InModules(slot)) return std::optional<SlotStorage>();
    const Setting* setting = &common;
    for (const Rule& rule : rules) {
      if (!MatchesAtStart(*rule.pattern, slot)) continue;
      if (rule.dense) return std::optional<SlotStorage>();
      setting = &rule.setting;
      break;
    }
    SlotStorage storage;
    storage.target = target_name;
    storage.marker = "qweight";
    storage.config_json = setting->ToJson();
    storage.required = {"qweight", "qzeros", "scales"};
    storage.optional = {"g_idx"};
    return std::optional<SlotStorage>(std::move(storage));
  }

 private:
  bool InModules(std::string_view slot) const {
    if (modules.empty() || slot == "lm_head") return true;
    const std::string name(slot);
    return std::any_of(modules.begin(), modules.end(), [&](const std::string& module) {
      return absl::EndsWith(name, absl::StrCat(".", module));
    });
  }
};

absl::Status ReadTarget(const Json& json, GptqConfig* config) {
  QM_ASSIGN_OR_RETURN(std::string format, GetString(json, "format", "gptq"));
  QM_ASSIGN_OR_RETURN(format, GetString(json, "checkpoint_format", format));
  if (format != "gptq" && format != "gptq_v2") {
    return absl::UnimplementedError(
        ErrorText(absl::StrCat("the GPTQ checkpoint has checkpoint_format '", format, "'"),
                  "only gptq and gptq_v2 are portable"));
  }
  QM_ASSIGN_OR_RETURN(const bool marlin, GetBool(json, "is_marlin_format", false));
  if (marlin) {
    return absl::UnimplementedError(
        "the GPTQ checkpoint has is_marlin_format, which only one "
        "kernel can read; convert it to gptq first");
  }
  config->target_name = format;
  return absl::OkStatus();
}

absl::Status ReadRules(const Json& json, GptqConfig* config) {
  const auto dynamic = json.find("dynamic");
  if (dynamic == json.end() || dynamic->is_null()) return absl::OkStatus();
  if (!dynamic->is_object()) return ConfigError("dynamic", "must be an object");
  for (const auto& [key, value] : dynamic->items()) {
    Rule rule;
    rule.dense = absl::StartsWith(key, "-:");
    const std::string pattern = rule.dense || absl::StartsWith(key, "+:") ? key.substr(2) : key;
    QM_ASSIGN_OR_RETURN(rule.pattern, CompilePythonPattern(pattern));
    rule.setting = config->common;
    if (!rule.dense) {
      if (!value.is_object()) return ConfigError("dynamic", "must map patterns to objects");
      QM_RETURN_IF_ERROR(ReadSetting(value, &rule.setting));
      QM_RETURN_IF_ERROR(CheckSetting(rule.setting));
    }
    config->rules.push_back(std::move(rule));
  }
  return absl::OkStatus();
}

absl::Status ReadModules(const Json& json, std::set<std::string>* modules) {
  for (const Json& entry : json) {
    if (entry.is_array()) {
      QM_RETURN_IF_ERROR(ReadModules(entry, modules));
    } else if (entry.is_string()) {
      modules->insert(entry.get<std::string>());
    } else {
      return ConfigError("modules_in_block_to_quantize", "must be a list of names");
    }
  }
  return absl::OkStatus();
}

std::string Escaped(const std::string& name) { return absl::StrReplaceAll(name, {{".", "\\."}}); }

// The names other engines give to linears they fuse: their rules are matched against "qkv_proj".
// Only where all parts are in `names`.
void AddFusedNames(std::vector<std::string>* names) {
  const std::set<std::string> all(names->begin(), names->end());
  const auto add = [&](const std::string& first, const std::vector<std::string>& others,
                       const std::string& fused) {
    for (const std::string& name : all) {
      if (!absl::EndsWith(name, first)) continue;
      const std::string stem(absl::StripSuffix(name, first));
      const bool complete = std::all_of(others.begin(), others.end(), [&](const std::string& part) {
        return all.count(stem + part) > 0;
      });
      if (complete) names->push_back(stem + fused);
    }
  };
  add("q_proj", {"k_proj", "v_proj"}, "qkv_proj");
  add("gate_proj", {"up_proj"}, "gate_up_proj");
}

std::string RulePattern(std::vector<std::string> names) {
  AddFusedNames(&names);
  std::vector<std::string> escaped;
  escaped.reserve(names.size());
  for (const std::string& name : names) escaped.push_back(Escaped(name));
  return escaped.size() == 1 ? absl::StrCat("^", escaped[0], "$")
                             : absl::StrCat("^(?:", absl::StrJoin(escaped, "|"), ")$");
}

}  // namespace

ConfigPointer ParseGptqConfig(const Json& json) {
  auto config = std::make_shared<GptqConfig>();
  QM_RETURN_IF_ERROR(ReadTarget(json, config.get()));
  QM_RETURN_IF_ERROR(ReadSetting(json, &config->common));
  QM_RETURN_IF_ERROR(CheckSetting(config->common));
  QM_ASSIGN_OR_RETURN(config->lm_head, GetBool(json, "lm_head", false));
  QM_RETURN_IF_ERROR(ReadRules(json, config.get()));
  const auto modules = json.find("modules_in_block_to_quantize");
  if (modules != json.end() && !modules->is_null()) {
    if (!modules->is_array()) {
      return ConfigError("modules_in_block_to_quantize", "must be a list of names");
    }
    QM_RETURN_IF_ERROR(ReadModules(*modules, &config->modules));
  }
  return std::shared_ptr<const QuantizationConfig>(std::move(config));
}

absl::StatusOr<Json> ComposeGptqConfig(std::string_view target,
                                       const std::vector<SlotEntry>& slots) {
  std::map<std::string, std::vector<std::string>> by_setting;
  std::vector<std::string> dense;
  bool lm_head = false;
  for (const SlotEntry& slot : slots) {
    if (slot.packed) {
      by_setting[slot.config_json].push_back(slot.name);
      lm_head = lm_head || slot.name == "lm_head";
    } else if (slot.name != "lm_head") {
      dense.push_back(slot.name);
    }
  }
  const auto common = std::max_element(
      by_setting.begin(), by_setting.end(),
      [](const auto& a, const auto& b) { return a.second.size() < b.second.size(); });
  const auto parsed = nlohmann::json::parse(common->first, nullptr, false);
  if (!parsed.is_object()) return absl::InternalError("per-layer GPTQ parameters are not JSON");

  Json config;
  for (const char* key : {"bits", "group_size", "desc_act", "sym"}) {
    if (!parsed.contains(key)) {
      return absl::InternalError(absl::StrCat("per-layer GPTQ parameters lack '", key, "'"));
    }
    config[key] = parsed[key];
  }
  config["quant_method"] = "gptq";
  config["checkpoint_format"] = std::string(target);
  config["damp_percent"] = 0.01;  // transformers refuses a file without it
  config["lm_head"] = lm_head;
  config["pack_dtype"] = "int32";
  Json dynamic = Json::object();
  if (!dense.empty()) dynamic["-:" + RulePattern(dense)] = Json::object();
  for (const auto& [setting, names] : by_setting) {
    if (setting == common->first) continue;
    dynamic["+:" + RulePattern(names)] = Json::parse(setting, nullptr, false);
  }
  if (!dynamic.empty()) config["dynamic"] = std::move(dynamic);
  return config;
}

}  // namespace quantmill
