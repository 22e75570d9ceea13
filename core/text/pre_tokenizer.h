// The "pre_tokenizer" of tokenizer.json: cuts text into the pieces that BPE works on.
#ifndef QUANTMILL_CORE_TEXT_PRE_TOKENIZER_H_
#define QUANTMILL_CORE_TEXT_PRE_TOKENIZER_H_

#include <deque>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// Pieces of one stretch of text, in order, none empty.
struct PieceList {
  std::vector<std::string_view> pieces;
  std::deque<std::string> storage;  // of pieces that are no part of the caller's text
  bool at_text_start = false;       // the first piece begins the whole input
};

class PreTokenizer {
 public:
  // Types Split, ByteLevel, Digits, Metaspace and Sequence; null = one piece. UNIMPLEMENTED names
  // any other, and ByteLevel anywhere but at the end.
  static absl::StatusOr<PreTokenizer> FromJson(const nlohmann::json& json);

  // True if pieces are to be read as bytes in a byte-level vocabulary.
  bool byte_level() const { return byte_level_; }
  absl::Status Apply(PieceList* list) const;

 private:
  using Step = std::function<absl::Status(PieceList*)>;

  absl::Status Add(const nlohmann::json& json);
  absl::Status AddSplit(const nlohmann::json& json);
  absl::Status AddByteLevel(const nlohmann::json& json);
  absl::Status AddDigits(const nlohmann::json& json);
  absl::Status AddMetaspace(const nlohmann::json& json);

  std::vector<Step> steps_;
  bool byte_level_ = false;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TEXT_PRE_TOKENIZER_H_
