// Layer patterns: globs over whole module names ('*' crosses dots, '?' is one character), or "re:"
// and a full-match RE2.
#ifndef QUANTMILL_HOST_PIPELINE_PATTERNS_H_
#define QUANTMILL_HOST_PIPELINE_PATTERNS_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace re2 {
class RE2;
}

namespace quantmill {

class LayerPattern {
 public:
  // INVALID_ARGUMENT for an empty pattern or a regular expression RE2 refuses.
  static absl::StatusOr<LayerPattern> Compile(const std::string& pattern);
  LayerPattern(LayerPattern&&) noexcept;
  LayerPattern& operator=(LayerPattern&&) noexcept;
  ~LayerPattern();

  bool Matches(const std::string& name) const;
  const std::string& text() const { return text_; }

 private:
  LayerPattern(std::string text, std::unique_ptr<re2::RE2> regex);

  std::string text_;
  std::unique_ptr<re2::RE2> regex_;
};

// True if one of them matches.
bool AnyMatches(const std::vector<LayerPattern>& patterns, const std::string& name);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PIPELINE_PATTERNS_H_
