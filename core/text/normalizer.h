// The "normalizer" of tokenizer.json.
#ifndef QUANTMILL_CORE_TEXT_NORMALIZER_H_
#define QUANTMILL_CORE_TEXT_NORMALIZER_H_

#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace quantmill {

class Normalizer {
 public:
  // Types NFC, NFD, NFKC, NFKD, Prepend, Replace and Sequence; null = none. UNIMPLEMENTED names any
  // other.
  static absl::StatusOr<Normalizer> FromJson(const nlohmann::json& json);

  // `text` is UTF-8.
  absl::StatusOr<std::string> Apply(std::string text) const;

 private:
  using Step = std::function<absl::StatusOr<std::string>(std::string)>;

  absl::Status Add(const nlohmann::json& json);

  std::vector<Step> steps_;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TEXT_NORMALIZER_H_
