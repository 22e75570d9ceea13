// One option value against its line in a method's table.
#ifndef QUANTMILL_HOST_PLUGINS_OPTION_VALUE_H_
#define QUANTMILL_HOST_PLUGINS_OPTION_VALUE_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "host/plugins/catalog.h"

namespace quantmill {

// The value in canonical text: decimal for whole numbers, the shortest text that reads back equal
// for real ones, "true" or "false", the choice, the string. INVALID_ARGUMENT says what would be
// right ("group_size wants a whole number, not 'x'"), without naming a place.
absl::StatusOr<std::string> CheckOptionValue(const OptionInfo& option, const std::string& text);

// The table's line itself: a known type, choices that can be read, a default that fits.
absl::Status CheckOptionInfo(const OptionInfo& option);

// "i64", "f64", "string", "enum", "bool"; "?" for an unknown type.
std::string OptionTypeName(qm_option_type type);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PLUGINS_OPTION_VALUE_H_
