// quantization_config of the native format: a map from slot to format id and parameters.
#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/checkpoint/config_kinds.h"

namespace quantmill {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kVersion = 1;

class NativeConfig : public QuantizationConfig {
 public:
  absl::flat_hash_map<std::string, SlotStorage> slots;

  std::string target() const override { return std::string(kNativeTarget); }

  absl::StatusOr<std::optional<SlotStorage>> Find(std::string_view slot) const override {
    const auto found = slots.find(std::string(slot));
    if (found == slots.end()) return std::optional<SlotStorage>();
    return std::optional<SlotStorage>(found->second);
  }
};

}  // namespace

ConfigPointer ParseNativeConfig(const Json& json) {
  QM_ASSIGN_OR_RETURN(const int64_t version, GetInt(json, "version", 0));
  if (version != kVersion) {
    return absl::UnimplementedError(absl::StrCat("quantmill checkpoint of version ", version,
                                                 "; this program reads version ", kVersion,
                                                 "; use a newer one"));
  }
  const auto slots = json.find("slots");
  if (slots == json.end() || !slots->is_object() || slots->empty()) {
    return ConfigError("slots", "must be an object with at least one slot");
  }
  auto config = std::make_shared<NativeConfig>();
  for (const auto& [name, value] : slots->items()) {
    const auto format = value.is_object() ? value.find("format") : value.end();
    const auto parameters = value.is_object() ? value.find("parameters") : value.end();
    if (!value.is_object() || format == value.end() || !format->is_string() ||
        parameters == value.end() || !parameters->is_object()) {
      return ConfigError(name, "must be an object with 'format' and 'parameters'");
    }
    SlotStorage storage;
    storage.target = std::string(kNativeTarget);
    storage.format_id = format->get<std::string>();
    storage.config_json = nlohmann::json(*parameters).dump();  // sorted keys
    config->slots.emplace(name, std::move(storage));
  }
  return std::shared_ptr<const QuantizationConfig>(std::move(config));
}

absl::StatusOr<Json> ComposeNativeConfig(std::string_view, const std::vector<SlotEntry>& slots) {
  Json map = Json::object();
  for (const SlotEntry& slot : slots) {
    if (!slot.packed) continue;
    const Json parameters = Json::parse(slot.config_json, nullptr, false);
    if (!parameters.is_object()) {
      return absl::InternalError(
          absl::StrCat("parameters of ", slot.name, " are not a JSON object"));
    }
    map[slot.name] = {{"format", slot.format_id}, {"parameters", parameters}};
  }
  return Json{{"quant_method", std::string(kNativeTarget)},
              {"version", kVersion},
              {"slots", std::move(map)}};
}

}  // namespace quantmill
