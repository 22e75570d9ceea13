// quantization_config of EETQ files: transformers src/transformers/utils/quantization_config.py
// (EetqConfig) and src/transformers/quantizers/base.py (modules left out); eetq's own saver,
// python/eetq/models/_config.py. Which linears are packed is told by their tensors.
#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/checkpoint/config_kinds.h"

namespace quantmill {
namespace {

using Json = nlohmann::ordered_json;

class EetqConfig : public QuantizationConfig {
 public:
  std::vector<std::string> skipped;

  std::string target() const override { return "eetq"; }

  absl::StatusOr<std::optional<SlotStorage>> Find(std::string_view slot) const override {
    const std::string name(slot);
    const bool skip = std::any_of(skipped.begin(), skipped.end(), [&](const std::string& entry) {
      return name == entry || absl::StrContains(name, entry + ".");
    });
    if (skip) return std::optional<SlotStorage>();
    SlotStorage storage;
    storage.target = "eetq";
    storage.config_json = R"({"weights":"int8"})";
    storage.marker = "weight_scales";
    storage.required = {"weight_scales"};
    storage.optional = {"weight", "qweight"};
    return std::optional<SlotStorage>(std::move(storage));
  }
};

}  // namespace

ConfigPointer ParseEetqConfig(const Json& json) {
  auto config = std::make_shared<EetqConfig>();
  QM_ASSIGN_OR_RETURN(const std::string weights, GetString(json, "weights", "int8"));
  if (weights != "int8") return ConfigError("weights", "must be int8, the only type of EETQ files");
  QM_ASSIGN_OR_RETURN(const int64_t bits, GetInt(json, "bits", 8));
  if (bits != 8) return ConfigError("bits", "must be 8, the only width of EETQ files");
  config->skipped = {"lm_head"};  // the reader's default
  const auto skipped = json.find("modules_to_not_convert");
  if (skipped == json.end() || skipped->is_null()) {
    return std::shared_ptr<const QuantizationConfig>(std::move(config));
  }
  config->skipped.clear();
  const bool strings =
      skipped->is_array() && std::all_of(skipped->begin(), skipped->end(),
                                         [](const Json& entry) { return entry.is_string(); });
  if (!strings) return ConfigError("modules_to_not_convert", "must be a list of names or null");
  for (const Json& entry : *skipped) config->skipped.push_back(entry.get<std::string>());
  return std::shared_ptr<const QuantizationConfig>(std::move(config));
}

absl::StatusOr<Json> ComposeEetqConfig(std::string_view, const std::vector<SlotEntry>& slots) {
  // Without a list the reader leaves the head out and nothing else.
  Json dense = Json::array();
  bool only_head = true;
  for (const SlotEntry& slot : slots) {
    if (slot.packed) continue;
    dense.push_back(slot.name);
    only_head = only_head && slot.name == "lm_head";
  }
  return Json{{"quant_method", "eetq"},
              {"weights", "int8"},
              {"modules_to_not_convert", only_head && dense.size() == 1 ? Json() : dense}};
}

}  // namespace quantmill
