// A JSON object without objects inside: what a weight's description in a file is.
#ifndef QUANTMILL_PLUGINS_NF4_FLAT_JSON_H_
#define QUANTMILL_PLUGINS_NF4_FLAT_JSON_H_

#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace quantmill::nf4 {

struct JsonValue {
  enum class Kind { kString, kNumber, kNumbers, kOther };  // kOther: null, true, false
  Kind kind = Kind::kOther;
  std::string text;             // kString
  std::vector<double> numbers;  // one of kNumber, the elements of kNumbers
};

using FlatJson = std::map<std::string, JsonValue>;

// False for anything but one object of strings, finite numbers, lists of numbers, and null, true or
// false, with distinct keys. Escapes other than \" \\ \/ \b \f \n \r \t are refused.
bool ParseFlatJson(std::string_view text, FlatJson* out);

}  // namespace quantmill::nf4

#endif  // QUANTMILL_PLUGINS_NF4_FLAT_JSON_H_
