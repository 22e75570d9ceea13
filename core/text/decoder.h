// The "decoder" of tokenizer.json: from tokens back to text.
#ifndef QUANTMILL_CORE_TEXT_DECODER_H_
#define QUANTMILL_CORE_TEXT_DECODER_H_

#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace quantmill {

class TokenDecoder {
 public:
  // Types ByteLevel, ByteFallback, Replace, Fuse, Strip, Metaspace and Sequence; UNIMPLEMENTED
  // names any other. Null = tokens joined by spaces, as in the reference.
  static absl::StatusOr<TokenDecoder> FromJson(const nlohmann::json& json);

  // The result is UTF-8: bytes that form no character become U+FFFD.
  absl::StatusOr<std::string> Decode(std::vector<std::string> tokens) const;

 private:
  using Tokens = std::vector<std::string>;
  using Step = std::function<absl::StatusOr<Tokens>(Tokens)>;

  absl::Status Add(const nlohmann::json& json);
  absl::Status AddReplace(const nlohmann::json& json);
  absl::Status AddStrip(const nlohmann::json& json);
  absl::Status AddMetaspace(const nlohmann::json& json);

  std::vector<Step> steps_;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TEXT_DECODER_H_
