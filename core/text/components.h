// Helpers shared by the readers of tokenizer.json's components.
#ifndef QUANTMILL_CORE_TEXT_COMPONENTS_H_
#define QUANTMILL_CORE_TEXT_COMPONENTS_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "core/text/regex.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// The "type" of a component object; `component` ("decoder") is for errors.
absl::StatusOr<std::string> ComponentType(const nlohmann::json& json, absl::string_view component);
absl::Status UnknownComponent(absl::string_view component, absl::string_view type);
absl::Status BadComponent(absl::string_view component, absl::string_view why);

absl::StatusOr<std::string> StringField(const nlohmann::json& json, const char* key,
                                        absl::string_view component);
// `fallback` if the key is absent or null.
absl::StatusOr<bool> BoolField(const nlohmann::json& json, const char* key, bool fallback,
                               absl::string_view component);
// "pattern": {"Regex": ...} or {"String": ...}.
absl::StatusOr<std::shared_ptr<const Regex>> PatternField(const nlohmann::json& json,
                                                          absl::string_view component);
// The list under `key` of a Sequence.
absl::StatusOr<const nlohmann::json*> ListField(const nlohmann::json& json, const char* key,
                                                absl::string_view component);

// Replaces every match of `pattern`.
absl::StatusOr<std::string> ReplaceMatches(const Regex& pattern, std::string_view text,
                                           std::string_view content);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TEXT_COMPONENTS_H_
