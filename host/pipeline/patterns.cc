#include "host/pipeline/patterns.h"

#include <re2/re2.h>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"

namespace quantmill {
namespace {

constexpr size_t kLongestPattern = 1000;

std::string GlobToRegex(const std::string& glob) {
  std::string regex;
  for (const char c : glob) {
    if (c == '*') {
      regex += ".*";
    } else if (c == '?') {
      regex += '.';
    } else {
      regex += re2::RE2::QuoteMeta(re2::StringPiece(&c, 1));
    }
  }
  return regex;
}

}  // namespace

LayerPattern::LayerPattern(std::string text, std::unique_ptr<re2::RE2> regex)
    : text_(std::move(text)), regex_(std::move(regex)) {}
LayerPattern::LayerPattern(LayerPattern&&) noexcept = default;
LayerPattern& LayerPattern::operator=(LayerPattern&&) noexcept = default;
LayerPattern::~LayerPattern() = default;

absl::StatusOr<LayerPattern> LayerPattern::Compile(const std::string& pattern) {
  const bool is_regex = pattern.rfind("re:", 0) == 0;
  const std::string body = is_regex ? pattern.substr(3) : pattern;
  if (body.empty()) return absl::InvalidArgumentError("empty layer pattern; write \"*\" for all");
  if (body.size() > kLongestPattern) {
    return absl::InvalidArgumentError(absl::StrCat("layer pattern of ", body.size(),
                                                   " characters; the limit is ", kLongestPattern));
  }
  re2::RE2::Options options;
  options.set_log_errors(false);
  options.set_max_mem(1 << 20);  // a pattern that needs more is refused, not run slowly
  // Latin-1: module names are bytes to us, and a stray byte in a glob must not make it invalid.
  options.set_encoding(re2::RE2::Options::EncodingLatin1);
  auto regex = std::make_unique<re2::RE2>(is_regex ? body : GlobToRegex(body), options);
  if (!regex->ok()) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrCat("layer pattern '", pattern, "' is not a regular expression"),
                  regex->error(), "see github.com/google/re2/wiki/Syntax"));
  }
  return LayerPattern(pattern, std::move(regex));
}

bool LayerPattern::Matches(const std::string& name) const {
  return re2::RE2::FullMatch(name, *regex_);
}

bool AnyMatches(const std::vector<LayerPattern>& patterns, const std::string& name) {
  for (const LayerPattern& pattern : patterns) {
    if (pattern.Matches(name)) return true;
  }
  return false;
}

}  // namespace quantmill
