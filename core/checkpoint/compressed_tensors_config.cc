// quantization_config of compressed-tensors files: src/compressed_tensors/quantization/
// quant_config.py, quant_scheme.py and quant_args.py.
#include <map>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/checkpoint/config_kinds.h"
#include "re2/re2.h"

namespace quantmill {
namespace {

using Json = nlohmann::ordered_json;

// An entry of `targets` or `ignore`: a module name, "re:PATTERN", or a class name.
class ModuleMatcher {
 public:
  static absl::StatusOr<ModuleMatcher> Parse(const Json& list, const char* key) {
    ModuleMatcher matcher;
    if (list.is_null()) return matcher;
    if (!list.is_array()) return ConfigError(key, "must be a list of names");
    for (const Json& entry : list) {
      if (!entry.is_string()) return ConfigError(key, "must be a list of names");
      const std::string text = entry.get<std::string>();
      if (absl::StartsWith(text, "re:")) {
        QM_ASSIGN_OR_RETURN(auto pattern, CompilePythonPattern(text.substr(3)));
        matcher.patterns_.push_back(std::move(pattern));
      } else if (text == "Linear") {
        matcher.every_linear_ = true;
      } else {
        matcher.names_.push_back(text);
      }
    }
    return matcher;
  }
  bool MatchesName(std::string_view slot) const {
    for (const std::string& name : names_) {
      if (name == slot) return true;
    }
    for (const auto& pattern : patterns_) {
      if (MatchesAtStart(*pattern, slot)) return true;
    }
    return false;
  }
  bool every_linear() const { return every_linear_; }

 private:
  std::vector<std::string> names_;
  std::vector<std::shared_ptr<const re2::RE2>> patterns_;
  bool every_linear_ = false;
};

struct Group {
  ModuleMatcher targets;
  SlotStorage storage;
};

class CompressedTensorsConfig : public QuantizationConfig {
 public:
  std::vector<Group> groups;
  ModuleMatcher ignore;

  std::string target() const override { return "compressed-tensors"; }

  absl::StatusOr<std::optional<SlotStorage>> Find(std::string_view slot) const override {
    if (ignore.MatchesName(slot) || ignore.every_linear()) return std::optional<SlotStorage>();
    for (const Group& group : groups) {
      if (group.targets.MatchesName(slot)) return std::optional<SlotStorage>(group.storage);
    }
    for (const Group& group : groups) {
      if (group.targets.every_linear()) return std::optional<SlotStorage>(group.storage);
    }
    return std::optional<SlotStorage>();
  }
};

// "group", "channel", or of floats "channel" or "tensor"; others hold scales in shapes that no
// format here has.
absl::StatusOr<std::string> ReadStrategy(const Json& weights, bool is_float) {
  const auto group_size = weights.find("group_size");
  const bool has_size = group_size != weights.end() && group_size->is_number_integer();
  const std::string inferred = !has_size                          ? "tensor"
                               : group_size->get<int64_t>() == -1 ? "channel"
                                                                  : "group";
  QM_ASSIGN_OR_RETURN(const std::string strategy, GetString(weights, "strategy", inferred));
  if (strategy != "channel" && strategy != (is_float ? "tensor" : "group")) {
    return absl::UnimplementedError(
        ErrorText(absl::StrCat("compressed-tensors weights with strategy '", strategy, "'"),
                  is_float ? "of 8-bit floats only tensor and channel are supported"
                           : "only group and channel are supported"));
  }
  if (strategy == "group" && !has_size) return ConfigError("group_size", "is missing");
  return strategy;
}

// "group", or "" for an order that leaves no trace in the file.
absl::StatusOr<std::string> ReadActorder(const Json& weights) {
  const auto found = weights.find("actorder");
  if (found == weights.end() || found->is_null() || *found == false) return std::string();
  if (*found == true || *found == "group" || *found == "dynamic") return std::string("group");
  if (*found == "weight" || *found == "static") return std::string();
  return ConfigError("actorder", "must be group, weight or null");
}

// "int8", "fp8", or "" where activations stay as they are.
absl::StatusOr<std::string> ReadActivations(const Json& group, bool is_float) {
  const auto found = group.find("input_activations");
  if (found == group.end() || found->is_null()) return std::string();
  if (!found->is_object()) return ConfigError("input_activations", "must be an object or null");
  QM_ASSIGN_OR_RETURN(const std::string type, GetString(*found, "type", "int"));
  QM_ASSIGN_OR_RETURN(const int64_t bits, GetInt(*found, "num_bits", 8));
  QM_ASSIGN_OR_RETURN(const bool symmetric, GetBool(*found, "symmetric", true));
  QM_ASSIGN_OR_RETURN(const std::string strategy, GetString(*found, "strategy", "token"));
  const auto dynamic = found->find("dynamic");
  const bool per_token = dynamic != found->end() && *dynamic == true && strategy == "token";
  if (!per_token || !symmetric || bits != 8 || type != (is_float ? "float" : "int")) {
    return absl::UnimplementedError(ErrorText(
        "compressed-tensors input_activations of another kind than is supported",
        "supported are 8 bits, symmetric, per token, dynamic, of the type of the weights"));
  }
  return std::string(is_float ? "fp8" : "int8");
}

absl::StatusOr<SlotStorage> ReadScheme(const Json& group, const std::string& common_format) {
  const auto found = group.find("weights");
  if (found == group.end() || !found->is_object()) {
    return ConfigError("weights", "of a config group must be an object");
  }
  const Json& weights = *found;
  QM_ASSIGN_OR_RETURN(const std::string type, GetString(weights, "type", "int"));
  if (type != "int" && type != "float") {
    return absl::UnimplementedError(absl::StrCat("compressed-tensors weights of type '", type,
                                                 "' are not supported; int and float are"));
  }
  const bool is_float = type == "float";
  QM_ASSIGN_OR_RETURN(const std::string format, GetString(group, "format", common_format));
  const bool known = is_float ? format == "float-quantized" || format == "naive-quantized"
                              : format == "pack-quantized" || format == "int-quantized";
  if (!known) {
    return absl::UnimplementedError(ErrorText(
        absl::StrCat("compressed-tensors format '", format, "' with weights of type ", type),
        is_float ? "only float-quantized and naive-quantized are supported"
                 : "only pack-quantized and int-quantized are supported"));
  }
  QM_ASSIGN_OR_RETURN(const int64_t bits, GetInt(weights, "num_bits", 8));
  QM_ASSIGN_OR_RETURN(const std::string strategy, ReadStrategy(weights, is_float));
  QM_ASSIGN_OR_RETURN(const std::string activations, ReadActivations(group, is_float));
  QM_ASSIGN_OR_RETURN(const std::string actorder, ReadActorder(weights));
  QM_ASSIGN_OR_RETURN(const bool symmetric, GetBool(weights, "symmetric", true));
  nlohmann::json json = {{"actorder", nullptr}, {"format", format},     {"group_size", nullptr},
                         {"num_bits", bits},    {"strategy", strategy}, {"symmetric", symmetric}};
  if (!actorder.empty()) json["actorder"] = actorder;
  if (!activations.empty()) json["activations"] = activations;
  if (is_float) {
    json["type"] = type;
    if (bits != 8 || !symmetric) {
      return absl::UnimplementedError(
          "compressed-tensors weights of type float are supported with 8 bits, symmetric");
    }
  }
  if (strategy == "group") {
    QM_ASSIGN_OR_RETURN(const int64_t size, GetInt(weights, "group_size", 0));
    if (size < 1) return ConfigError("group_size", "must be positive with strategy group");
    json["group_size"] = size;
  }
  SlotStorage storage;
  storage.target = "compressed-tensors";
  storage.config_json = json.dump();
  const bool packed = format == "pack-quantized";
  storage.required = packed
                         ? std::vector<std::string>{"weight_packed", "weight_scale", "weight_shape"}
                         : std::vector<std::string>{"weight", "weight_scale"};
  (symmetric ? storage.optional : storage.required).push_back("weight_zero_point");
  (actorder.empty() ? storage.optional : storage.required).push_back("weight_g_idx");
  return storage;
}

// null where the key is absent.
nlohmann::json Field(const nlohmann::json& object, const char* key) {
  const auto found = object.find(key);
  return found == object.end() ? nlohmann::json() : *found;
}

// The args of activations that are quantized when they arrive, row by row.
nlohmann::json InputActivations(const nlohmann::json& slot) {
  const nlohmann::json activations = Field(slot, "activations");
  if (activations.is_null()) return nullptr;
  return {{"actorder", nullptr},
          {"block_structure", nullptr},
          {"dynamic", true},
          {"group_size", nullptr},
          {"num_bits", 8},
          {"observer", nullptr},
          {"observer_kwargs", nlohmann::json::object()},
          {"strategy", "token"},
          {"symmetric", true},
          {"type", activations == "fp8" ? "float" : "int"}};
}

nlohmann::json Scheme(const nlohmann::json& slot) {
  nlohmann::json weights = {{"block_structure", nullptr},
                            {"dynamic", false},
                            {"observer", "minmax"},
                            {"observer_kwargs", nlohmann::json::object()},
                            {"type", "int"}};
  if (!Field(slot, "type").is_null()) weights["type"] = Field(slot, "type");
  for (const char* key : {"actorder", "group_size", "num_bits", "strategy", "symmetric"}) {
    weights[key] = Field(slot, key);
  }
  return {{"input_activations", InputActivations(slot)},
          {"output_activations", nullptr},
          {"weights", weights}};
}

}  // namespace

ConfigPointer ParseCompressedTensorsConfig(const Json& json) {
  auto config = std::make_shared<CompressedTensorsConfig>();
  QM_ASSIGN_OR_RETURN(const std::string status,
                      GetString(json, "quantization_status", "compressed"));
  if (status != "compressed") {
    return absl::UnimplementedError(absl::StrCat("compressed-tensors checkpoint with status '",
                                                 status, "'; only compressed ones can be read"));
  }
  QM_ASSIGN_OR_RETURN(const std::string format, GetString(json, "format", ""));
  const auto groups = json.find("config_groups");
  if (groups == json.end() || !groups->is_object() || groups->empty()) {
    return ConfigError("config_groups", "must be an object with at least one group");
  }
  for (const auto& [name, value] : groups->items()) {
    if (!value.is_object()) return ConfigError("config_groups", "must hold objects");
    Group group;
    QM_ASSIGN_OR_RETURN(group.storage, ReadScheme(value, format));
    const auto targets = value.find("targets");
    if (targets == value.end()) return ConfigError("targets", "is missing in a config group");
    QM_ASSIGN_OR_RETURN(group.targets, ModuleMatcher::Parse(*targets, "targets"));
    config->groups.push_back(std::move(group));
  }
  const auto ignore = json.find("ignore");
  if (ignore != json.end()) {
    QM_ASSIGN_OR_RETURN(config->ignore, ModuleMatcher::Parse(*ignore, "ignore"));
  }
  return std::shared_ptr<const QuantizationConfig>(std::move(config));
}

absl::StatusOr<Json> ComposeCompressedTensorsConfig(std::string_view,
                                                    const std::vector<SlotEntry>& slots) {
  // In the order of first use, so that the file follows the model.
  std::vector<std::string> settings;
  std::map<std::string, std::vector<std::string>> names;
  std::vector<std::string> ignore;
  for (const SlotEntry& slot : slots) {
    if (!slot.packed) {
      ignore.push_back(slot.name);
    } else {
      auto& list = names[slot.config_json];
      if (list.empty()) settings.push_back(slot.config_json);
      list.push_back(slot.name);
    }
  }
  nlohmann::json groups = nlohmann::json::object();
  std::string format;
  bool mixed = false;
  for (const std::string& setting : settings) {
    const auto slot = nlohmann::json::parse(setting, nullptr, false);
    if (!slot.is_object()) return absl::InternalError("per-layer parameters are not JSON");
    const nlohmann::json slot_format_json = Field(slot, "format");
    if (!slot_format_json.is_string()) {
      return absl::InternalError("per-layer parameters lack 'format'");
    }
    const std::string slot_format = slot_format_json.get<std::string>();
    mixed = mixed || (!format.empty() && slot_format != format);
    format = slot_format;
    nlohmann::json scheme = Scheme(slot);
    scheme["format"] = slot_format;
    scheme["targets"] = settings.size() == 1 ? std::vector<std::string>{"Linear"} : names[setting];
    groups[absl::StrCat("group_", groups.size())] = std::move(scheme);
  }
  // Only groups that differ name their format: older readers do not know the key there.
  if (mixed) format = "mixed-precision";
  for (auto& [name, scheme] : groups.items()) {
    if (!mixed) scheme.erase("format");
  }
  // The library writes its keys sorted; nlohmann::json sorts.
  const nlohmann::json config = {{"config_groups", groups},
                                 {"format", format},
                                 {"global_compression_ratio", nullptr},
                                 {"ignore", ignore},
                                 {"kv_cache_scheme", nullptr},
                                 {"quant_method", "compressed-tensors"},
                                 {"quantization_status", "compressed"},
                                 {"sparsity_config", nlohmann::json::object()},
                                 {"transform_config", nlohmann::json::object()},
                                 {"version", "0.10.2"}};
  return Json(config);
}

}  // namespace quantmill
