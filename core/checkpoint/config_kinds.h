// The kinds of `quantization_config` behind quantization_config.h, one file each, and what they
// share.
#ifndef QUANTMILL_CORE_CHECKPOINT_CONFIG_KINDS_H_
#define QUANTMILL_CORE_CHECKPOINT_CONFIG_KINDS_H_

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "core/checkpoint/quantization_config.h"
#include "nlohmann/json.hpp"

namespace re2 {
class RE2;
}

namespace quantmill {

using ConfigPointer = absl::StatusOr<std::shared_ptr<const QuantizationConfig>>;

// One value of `quant_method` and the targets stored under it. The rows are in
// quantization_config.cc.
struct ConfigKind {
  std::string_view quant_method;
  std::vector<std::string> targets;
  ConfigPointer (*parse)(const nlohmann::ordered_json& json);
  absl::StatusOr<nlohmann::ordered_json> (*compose)(std::string_view target,
                                                    const std::vector<SlotEntry>& slots);
};

ConfigPointer ParseBitsAndBytesConfig(const nlohmann::ordered_json& json);
ConfigPointer ParseGptqConfig(const nlohmann::ordered_json& json);
ConfigPointer ParseCompressedTensorsConfig(const nlohmann::ordered_json& json);
ConfigPointer ParseAwqConfig(const nlohmann::ordered_json& json);
ConfigPointer ParseHqqConfig(const nlohmann::ordered_json& json);
ConfigPointer ParseEetqConfig(const nlohmann::ordered_json& json);
ConfigPointer ParseAqlmConfig(const nlohmann::ordered_json& json);
ConfigPointer ParseNativeConfig(const nlohmann::ordered_json& json);
// From the types of a GGUF file's tensors; null if none of its linears is kept as blocks.
ConfigPointer ReadGgufQuantization(const std::string& path);

absl::StatusOr<nlohmann::ordered_json> ComposeBitsAndBytesConfig(
    std::string_view target, const std::vector<SlotEntry>& slots);
absl::StatusOr<nlohmann::ordered_json> ComposeGptqConfig(std::string_view target,
                                                         const std::vector<SlotEntry>& slots);
absl::StatusOr<nlohmann::ordered_json> ComposeCompressedTensorsConfig(
    std::string_view target, const std::vector<SlotEntry>& slots);
absl::StatusOr<nlohmann::ordered_json> ComposeAwqConfig(std::string_view target,
                                                        const std::vector<SlotEntry>& slots);
absl::StatusOr<nlohmann::ordered_json> ComposeHqqConfig(std::string_view target,
                                                        const std::vector<SlotEntry>& slots);
absl::StatusOr<nlohmann::ordered_json> ComposeEetqConfig(std::string_view target,
                                                         const std::vector<SlotEntry>& slots);
absl::StatusOr<nlohmann::ordered_json> ComposeAqlmConfig(std::string_view target,
                                                         const std::vector<SlotEntry>& slots);
absl::StatusOr<nlohmann::ordered_json> ComposeNativeConfig(std::string_view target,
                                                           const std::vector<SlotEntry>& slots);

// A pattern that other programs match with Python's re.match: anchored at the start only.
// UNIMPLEMENTED for what RE2 lacks (look-around, back references).
absl::StatusOr<std::shared_ptr<const re2::RE2>> CompilePythonPattern(const std::string& pattern);
bool MatchesAtStart(const re2::RE2& pattern, std::string_view name);

// The routers of the experts among `slots`: linears that readers would convert, though no slots.
std::vector<std::string> RoutersOf(const std::vector<SlotEntry>& slots);

// "quantization_config: 'KEY' WHY".
absl::Status ConfigError(std::string_view key, std::string_view why);
// Values with a default; INVALID_ARGUMENT for another type.
absl::StatusOr<bool> GetBool(const nlohmann::ordered_json& json, const char* key, bool fallback);
absl::StatusOr<int64_t> GetInt(const nlohmann::ordered_json& json, const char* key,
                               int64_t fallback);
absl::StatusOr<std::string> GetString(const nlohmann::ordered_json& json, const char* key,
                                      const std::string& fallback);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_CHECKPOINT_CONFIG_KINDS_H_
