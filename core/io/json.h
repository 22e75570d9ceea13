// Strict JSON: names the source and the position of a mistake, refuses duplicate keys and nesting
// deep enough to exhaust the stack of recursive code.
#ifndef QUANTMILL_CORE_IO_JSON_H_
#define QUANTMILL_CORE_IO_JSON_H_

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// Parses UTF-8 `text`; `source` is the file name for errors (INVALID_ARGUMENT). Objects are sorted
// by key and looked up in logarithmic time: for large documents.
absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, std::string_view source);
// Keeps the order of keys, at linear cost per lookup: for small documents that are written back.
absl::StatusOr<nlohmann::ordered_json> ParseOrderedJson(std::string_view text,
                                                        std::string_view source);

// Reads and parses a file.
absl::StatusOr<nlohmann::json> ReadJson(const std::string& path);
absl::StatusOr<nlohmann::ordered_json> ReadOrderedJson(const std::string& path);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_IO_JSON_H_
