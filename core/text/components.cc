#include "core/text/components.h"

#include "core/base/status.h"

namespace quantmill {

absl::Status BadComponent(absl::string_view component, absl::string_view why) {
  return absl::InvalidArgumentError(
      ErrorText(absl::StrCat("tokenizer.json: ", component, " ", why)));
}

absl::Status UnknownComponent(absl::string_view component, absl::string_view type) {
  return absl::UnimplementedError(ErrorText(
      absl::StrCat("tokenizer.json: ", component, " of type ", type, " is not supported")));
}

absl::StatusOr<std::string> ComponentType(const nlohmann::json& json, absl::string_view component) {
  if (!json.is_object()) return BadComponent(component, "is not an object");
  return StringField(json, "type", component);
}

absl::StatusOr<std::string> StringField(const nlohmann::json& json, const char* key,
                                        absl::string_view component) {
  const auto found = json.find(key);
  if (found == json.end() || !found->is_string()) {
    return BadComponent(component, absl::StrCat("has no string \"", key, "\""));
  }
  return found->get<std::string>();
}

absl::StatusOr<bool> BoolField(const nlohmann::json& json, const char* key, bool fallback,
                               absl::string_view component) {
  const auto found = json.find(key);
  if (found == json.end() || found->is_null()) return fallback;
  if (!found->is_boolean()) {
    return BadComponent(component, absl::StrCat("\"", key, "\" is not true or false"));
  }
  return found->get<bool>();
}

absl::StatusOr<std::shared_ptr<const Regex>> PatternField(const nlohmann::json& json,
                                                          absl::string_view component) {
  const auto found = json.find("pattern");
  if (found != json.end() && found->is_object()) {
    if (found->contains("Regex")) {
      QM_ASSIGN_OR_RETURN(const std::string text, StringField(*found, "Regex", component));
      return Regex::Compile(text);
    }
    if (found->contains("String")) {
      QM_ASSIGN_OR_RETURN(const std::string text, StringField(*found, "String", component));
      return Regex::Literal(text);
    }
  }
  return BadComponent(component, "has no \"pattern\" with a Regex or a String");
}

absl::StatusOr<const nlohmann::json*> ListField(const nlohmann::json& json, const char* key,
                                                absl::string_view component) {
  const auto found = json.find(key);
  if (found == json.end() || !found->is_array()) {
    return BadComponent(component, absl::StrCat("has no list \"", key, "\""));
  }
  return &*found;
}

absl::StatusOr<std::string> ReplaceMatches(const Regex& pattern, std::string_view text,
                                           std::string_view content) {
  std::string out;
  size_t done = 0;
  QM_RETURN_IF_ERROR(pattern.ForEachMatch(text, [&](size_t begin, size_t end) {
    out += text.substr(done, begin - done);
    out += content;
    done = end;
  }));
  out += text.substr(done);
  return out;
}

}  // namespace quantmill
