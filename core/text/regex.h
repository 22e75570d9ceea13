// Regular expressions of tokenizer.json, on PCRE2 (Unicode properties, look-ahead, JIT).
#ifndef QUANTMILL_CORE_TEXT_REGEX_H_
#define QUANTMILL_CORE_TEXT_REGEX_H_

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace quantmill {

// Compiled once, used from any thread.
class Regex {
 public:
  // INVALID_ARGUMENT for a malformed pattern and for constructs that mean something else in the
  // dialect the files are written for (Oniguruma): a character class within another, "&&".
  static absl::StatusOr<std::shared_ptr<const Regex>> Compile(const std::string& pattern);
  // Matches `text` itself.
  static std::shared_ptr<const Regex> Literal(std::string_view text);
  ~Regex();

  // Calls `found(begin, end)` for every non-empty match, left to right, without overlap. `text`
  // must be UTF-8.
  absl::Status ForEachMatch(std::string_view text,
                            const std::function<void(size_t, size_t)>& found) const;

 private:
  struct Compiled;
  Regex() = default;

  std::string literal_;
  std::unique_ptr<Compiled> compiled_;  // null: a literal
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TEXT_REGEX_H_
