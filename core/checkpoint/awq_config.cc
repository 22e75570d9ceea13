// quantization_config of AWQ files: AutoAWQ awq/models/_config.py; transformers
// src/transformers/utils/quantization_config.py (AwqConfig); what vLLM reads is in
// vllm/model_executor/layers/quantization/awq.py. Older files stand in quant_config.json and have
// the names w_bit and q_group_size.
//
// Which linears are dense: an entry of modules_to_not_convert is part of their name. lm_head is
// never packed.
#include <algorithm>
#include <map>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/base/status.h"
#include "core/checkpoint/config_kinds.h"

namespace quantmill {
namespace {

using Json = nlohmann::ordered_json;

class AwqConfig : public QuantizationConfig {
 public:
  std::vector<std::string> dense;
  std::string parameters;

  std::string target() const override { return "awq"; }

  absl::StatusOr<std::optional<SlotStorage>> Find(std::string_view slot) const override {
    const bool left_out = std::any_of(dense.begin(), dense.end(), [&](const std::string& part) {
      return slot.find(part) != std::string_view::npos;
    });
    if (left_out || slot == "lm_head") return std::optional<SlotStorage>();
    SlotStorage storage;
    storage.target = "awq";
    storage.marker = "qweight";
    storage.config_json = parameters;
    storage.required = {"qweight", "qzeros", "scales"};
    return std::optional<SlotStorage>(std::move(storage));
  }
};

absl::Status CheckVersion(const Json& json) {
  QM_ASSIGN_OR_RETURN(std::string version, GetString(json, "format", "gemm"));
  QM_ASSIGN_OR_RETURN(version, GetString(json, "version", version));
  absl::AsciiStrToLower(&version);
  if (version == "gemm") return absl::OkStatus();
  return absl::UnimplementedError(
      ErrorText(absl::StrCat("the AWQ checkpoint has version '", version, "'"),
                "its codes are laid out for one kernel; only gemm is portable",
                "fetch the checkpoint in version gemm, or quantize the original model again"));
}

// {"bits":4,"group_size":128,"zero_point":true}
absl::StatusOr<std::string> ReadAwqParameters(const Json& json) {
  QM_ASSIGN_OR_RETURN(int64_t bits, GetInt(json, "w_bit", 4));
  QM_ASSIGN_OR_RETURN(bits, GetInt(json, "bits", bits));
  if (bits != 4) {
    return ConfigError("bits", absl::StrCat("is ", bits, "; version gemm has 4"));
  }
  QM_ASSIGN_OR_RETURN(int64_t group_size, GetInt(json, "q_group_size", 128));
  QM_ASSIGN_OR_RETURN(group_size, GetInt(json, "group_size", group_size));
  if (group_size != -1 && group_size < 1) {
    return ConfigError("group_size",
                       absl::StrCat("is ", group_size, "; it must be -1 or positive"));
  }
  QM_ASSIGN_OR_RETURN(const bool zero_point, GetBool(json, "zero_point", true));
  const nlohmann::json parameters = {
      {"bits", bits}, {"group_size", group_size}, {"zero_point", zero_point}};
  return parameters.dump();
}

}  // namespace

ConfigPointer ParseAwqConfig(const Json& json) {
  auto config = std::make_shared<AwqConfig>();
  QM_RETURN_IF_ERROR(CheckVersion(json));
  QM_ASSIGN_OR_RETURN(config->parameters, ReadAwqParameters(json));
  const auto dense = json.find("modules_to_not_convert");
  if (dense == json.end() || dense->is_null()) {
    return std::shared_ptr<const QuantizationConfig>(std::move(config));
  }
  if (!dense->is_array()) return ConfigError("modules_to_not_convert", "must be a list of names");
  for (const Json& entry : *dense) {
    if (!entry.is_string()) return ConfigError("modules_to_not_convert", "must be a list of names");
    config->dense.push_back(entry.get<std::string>());
  }
  return std::shared_ptr<const QuantizationConfig>(std::move(config));
}

absl::StatusOr<Json> ComposeAwqConfig(std::string_view, const std::vector<SlotEntry>& slots) {
  std::vector<std::string> dense = RoutersOf(slots);
  std::map<int64_t, std::string> groups;  // sizes, each with the first linear that has it
  for (const SlotEntry& slot : slots) {
    if (!slot.packed) {
      if (slot.name != "lm_head") dense.push_back(slot.name);
      continue;
    }
    if (slot.name == "lm_head") {
      return absl::FailedPreconditionError(
          ErrorText("lm_head is packed", "readers of awq files take it to be dense",
                    "leave it out of the stage's layers, or export as gptq"));
    }
    const auto parsed = nlohmann::json::parse(slot.config_json, nullptr, false);
    if (!parsed.is_object() || !parsed.contains("group_size")) {
      return absl::InternalError("per-layer AWQ parameters lack 'group_size'");
    }
    groups.emplace(parsed["group_size"].get<int64_t>(), slot.name);
  }
  if (groups.size() > 1) {
    return absl::FailedPreconditionError(
        ErrorText(absl::StrCat(groups.begin()->second, " has groups of ", groups.begin()->first,
                               ", ", groups.rbegin()->second, " of ", groups.rbegin()->first),
                  "an awq file has one group size for all linears",
                  "use the same group_size everywhere, or export as gptq or compressed-tensors"));
  }
  Json config = {{"quant_method", "awq"},
                 {"zero_point", true},  // stored also where they are all the same
                 {"group_size", groups.begin()->first},
                 {"bits", 4},
                 {"version", "gemm"}};
  config["modules_to_not_convert"] = dense.empty() ? Json(nullptr) : Json(dense);
  return config;
}

}  // namespace quantmill
