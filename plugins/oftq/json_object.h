// The members of a JSON object, as far as an adapter's description needs them.
#ifndef QUANTMILL_PLUGINS_OFTQ_JSON_OBJECT_H_
#define QUANTMILL_PLUGINS_OFTQ_JSON_OBJECT_H_

#include <map>
#include <string>
#include <string_view>

namespace quantmill::oftq {

struct JsonValue {
  enum class Kind { kNull, kBool, kNumber, kString, kList, kObject };
  Kind kind = Kind::kNull;
  bool truth = false;   // kBool
  double number = 0.0;  // kNumber
  std::string text;     // kString
  bool empty = true;    // kList, kObject; what they hold is checked and dropped
};

using JsonObject = std::map<std::string, JsonValue>;

// False for anything but one JSON object with distinct keys, nested at most 32 deep. Characters
// escaped as \uXXXX become '?'.
bool ParseJsonObject(std::string_view text, JsonObject* out);

}  // namespace quantmill::oftq

#endif  // QUANTMILL_PLUGINS_OFTQ_JSON_OBJECT_H_
