// quantization_config of AQLM files: transformers src/transformers/utils/quantization_config.py
// (AqlmConfig) and src/transformers/integrations/aqlm.py.
//
// One scheme serves the whole file. A linear is packed unless `<name>.weight` is listed in
// linear_weights_not_to_quantize.
#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/checkpoint/config_kinds.h"

namespace quantmill {
namespace {

using Json = nlohmann::ordered_json;

class AqlmConfig : public QuantizationConfig {
 public:
  std::set<std::string, std::less<>> dense;  // parameter names
  std::string scheme;                        // {"codebooks":2,"group_size":8,"index_bits":8}

  std::string target() const override { return "aqlm"; }

  absl::StatusOr<std::optional<SlotStorage>> Find(std::string_view slot) const override {
    if (dense.count(absl::StrCat(std::string(slot), ".weight")) > 0) {
      return std::optional<SlotStorage>();
    }
    SlotStorage storage;
    storage.target = "aqlm";
    storage.marker = "codes";
    storage.config_json = scheme;
    storage.required = {"codes", "codebooks", "scales"};
    return std::optional<SlotStorage>(std::move(storage));
  }
};

absl::Status ReadPositive(const Json& json, const char* key, int64_t fallback, int64_t most,
                          int64_t* out) {
  QM_ASSIGN_OR_RETURN(*out, GetInt(json, key, fallback));
  if (*out < 1 || *out > most) {
    return ConfigError(key, absl::StrCat("is ", *out, "; it must be 1 .. ", most));
  }
  return absl::OkStatus();
}

}  // namespace

ConfigPointer ParseAqlmConfig(const Json& json) {
  auto config = std::make_shared<AqlmConfig>();
  int64_t codebooks = 0, group = 0, bits = 0, rows = 0;
  // The defaults are the reader's.
  QM_RETURN_IF_ERROR(ReadPositive(json, "num_codebooks", 1, 16, &codebooks));
  QM_RETURN_IF_ERROR(ReadPositive(json, "in_group_size", 8, 1024, &group));
  QM_RETURN_IF_ERROR(ReadPositive(json, "nbits_per_codebook", 16, 16, &bits));
  QM_RETURN_IF_ERROR(ReadPositive(json, "out_group_size", 1, 1 << 20, &rows));
  if (rows != 1) {
    return absl::UnimplementedError(
        ErrorText(absl::StrCat("the AQLM checkpoint has out_group_size ", rows),
                  "groups over several outputs are not supported"));
  }
  const auto listed = json.find("linear_weights_not_to_quantize");
  if (listed != json.end() && !listed->is_null()) {
    if (!listed->is_array()) {
      return ConfigError("linear_weights_not_to_quantize", "must be a list of names");
    }
    for (const Json& entry : *listed) {
      if (!entry.is_string()) {
        return ConfigError("linear_weights_not_to_quantize", "must be a list of names");
      }
      config->dense.insert(entry.get<std::string>());
    }
  }
  config->scheme =
      nlohmann::json{{"codebooks", codebooks}, {"group_size", group}, {"index_bits", bits}}.dump();
  return std::shared_ptr<const QuantizationConfig>(std::move(config));
}

absl::StatusOr<Json> ComposeAqlmConfig(std::string_view, const std::vector<SlotEntry>& slots) {
  // The caller has seen that one is packed.
  const SlotEntry& first =
      *std::find_if(slots.begin(), slots.end(), [](const SlotEntry& slot) { return slot.packed; });
  std::vector<std::string> dense;
  for (const SlotEntry& slot : slots) {
    if (!slot.packed) {
      dense.push_back(slot.name + ".weight");
      continue;
    }
    if (slot.config_json != first.config_json) {
      return absl::FailedPreconditionError(ErrorText(
          absl::StrCat(slot.name, " is packed as ", slot.config_json, ", ", first.name, " as ",
                       first.config_json),
          "aqlm files have one scheme for all linears",
          "use one scheme and group_size, leave the others dense, or export as quantmill"));
    }
  }
  const auto scheme = nlohmann::json::parse(first.config_json, nullptr, false);
  if (!scheme.is_object() || !scheme.contains("codebooks") || !scheme.contains("group_size") ||
      !scheme.contains("index_bits")) {
    return absl::InternalError(
        "per-layer AQLM parameters lack codebooks, group_size or index_bits");
  }
  dense.emplace_back("model.embed_tokens.weight");  // as published files do
  return Json{{"quant_method", "aqlm"},
              {"nbits_per_codebook", scheme["index_bits"]},
              {"num_codebooks", scheme["codebooks"]},
              {"out_group_size", 1},
              {"in_group_size", scheme["group_size"]},
              {"linear_weights_not_to_quantize", dense}};
}

}  // namespace quantmill
