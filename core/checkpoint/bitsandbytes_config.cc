// quantization_config of bitsandbytes files: transformers
// src/transformers/utils/quantization_config.py (BitsAndBytesConfig) and
// src/transformers/quantizers/quantizer_bnb_4bit.py.
//
// What a packed linear holds is described with its tensors; the config says of all alike which
// codebook it is, and whether factors are quantized ("double quantization"). Which linears are
// packed is told by their tensors.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/checkpoint/config_kinds.h"

namespace quantmill {
namespace {

using Json = nlohmann::ordered_json;

class BitsAndBytesConfig : public QuantizationConfig {
 public:
  std::string target() const override { return "bitsandbytes"; }

  absl::StatusOr<std::optional<SlotStorage>> Find(std::string_view) const override {
    SlotStorage storage;
    storage.target = "bitsandbytes";
    storage.marker = "weight.absmax";
    storage.config_json = "{}";
    storage.required = {"weight", "weight.absmax", "weight.quant_map"};
    storage.optional = {"weight.nested_absmax", "weight.nested_quant_map",
                        "weight.quant_state.bitsandbytes__nf4",
                        "weight.quant_state.bitsandbytes__fp4"};
    return std::optional<SlotStorage>(std::move(storage));
  }
};

// Of one packed linear: {"compute_dtype":"bfloat16","double_quant":false,"quant_type":"nf4"}.
absl::StatusOr<nlohmann::json> ReadParameters(const SlotEntry& slot) {
  auto json = nlohmann::json::parse(slot.config_json, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("compute_dtype") || !json.contains("double_quant") ||
      !json.contains("quant_type")) {
    return absl::InternalError(absl::StrCat("the parameters of ", slot.name,
                                            " lack compute_dtype, double_quant or quant_type"));
  }
  return json;
}

}  // namespace

ConfigPointer ParseBitsAndBytesConfig(const Json& json) {
  for (const char* prefix : {"", "_"}) {
    QM_ASSIGN_OR_RETURN(const bool eight,
                        GetBool(json, absl::StrCat(prefix, "load_in_8bit").c_str(), false));
    if (!eight) continue;
    return absl::UnimplementedError(
        ErrorText("the checkpoint holds bitsandbytes weights of 8 bits (LLM.int8())",
                  "of bitsandbytes, 4-bit checkpoints can be read",
                  "use the original checkpoint, or one with load_in_4bit"));
  }
  QM_ASSIGN_OR_RETURN(const bool four, GetBool(json, "load_in_4bit", false));
  QM_ASSIGN_OR_RETURN(const bool four_too, GetBool(json, "_load_in_4bit", false));
  if (!four && !four_too) return ConfigError("load_in_4bit", "is not set, nor is load_in_8bit");
  QM_ASSIGN_OR_RETURN(const std::string type, GetString(json, "bnb_4bit_quant_type", "fp4"));
  if (type != "nf4" && type != "fp4") {
    return ConfigError("bnb_4bit_quant_type",
                       absl::StrCat("is '", type, "'; nf4 and fp4 are known"));
  }
  return std::shared_ptr<const QuantizationConfig>(std::make_shared<BitsAndBytesConfig>());
}

absl::StatusOr<Json> ComposeBitsAndBytesConfig(std::string_view,
                                               const std::vector<SlotEntry>& slots) {
  nlohmann::json common;
  std::string first;
  std::vector<std::string> dense = RoutersOf(slots);
  for (const SlotEntry& slot : slots) {
    if (!slot.packed) {
      dense.push_back(slot.name);
      continue;
    }
    QM_ASSIGN_OR_RETURN(nlohmann::json parameters, ReadParameters(slot));
    if (common.is_null()) {
      common = std::move(parameters);
      first = slot.name;
    } else if (common["quant_type"] != parameters["quant_type"] ||
               common["double_quant"] != parameters["double_quant"]) {
      return absl::FailedPreconditionError(
          ErrorText(absl::StrCat(slot.name, " and ", first, " differ in type or double_quant"),
                    "readers of bitsandbytes files take one setting for all linears",
                    "quantize all of them alike, or export as quantmill"));
    }
  }
  // Left out, this key would mean the reader's own choice.
  if (std::find(dense.begin(), dense.end(), "lm_head") == dense.end() &&
      std::none_of(slots.begin(), slots.end(),
                   [](const SlotEntry& slot) { return slot.packed && slot.name == "lm_head"; })) {
    dense.emplace_back("lm_head");
  }
  return Json{{"quant_method", "bitsandbytes"},
              {"_load_in_4bit", true},
              {"_load_in_8bit", false},
              {"load_in_4bit", true},
              {"load_in_8bit", false},
              {"bnb_4bit_quant_type", common["quant_type"]},
              {"bnb_4bit_compute_dtype", common["compute_dtype"]},
              {"bnb_4bit_use_double_quant", common["double_quant"]},
              {"bnb_4bit_quant_storage", "uint8"},
              {"llm_int8_threshold", 6.0},
              {"llm_int8_skip_modules", dense},
              {"llm_int8_enable_fp32_cpu_offload", false},
              {"llm_int8_has_fp16_weight", false}};
}

}  // namespace quantmill
