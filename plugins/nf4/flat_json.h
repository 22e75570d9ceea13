// A JSON object without objects inside: what a weight's description in a file is.
#ifndef QUANTMILL_PLUGINS_NF4_FLAT_JSON_H_
#define QUANTMILL_PLUGINS_NF4_FLAT_JSON_H_

#include <string_view>

#include "quantmill/sdk/json.hpp"

namespace quantmill::nf4 {

using FlatJson = qm::JsonObject;
using JsonValue = qm::JsonValue;

// False for anything but one object of strings, finite numbers, lists of numbers, and null, true or
// false, with distinct keys. Escapes other than \" \\ \/ \b \f \n \r \t are refused.
inline bool ParseFlatJson(std::string_view text, FlatJson* out) {
  if (!qm::ParseJsonObject(text, qm::JsonUnicode::kRefuse, out)) return false;
  for (const auto& [key, value] : *out) {
    if (value.kind == JsonValue::Kind::kObject) return false;
    if (value.kind == JsonValue::Kind::kList && !value.numeric) return false;
  }
  return true;
}

}  // namespace quantmill::nf4

#endif  // QUANTMILL_PLUGINS_NF4_FLAT_JSON_H_
