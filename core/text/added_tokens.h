// Tokens that are found in the text as they are, before BPE (huggingface/tokenizers:
// tokenizers/src/tokenizer/added_vocabulary.rs).
#ifndef QUANTMILL_CORE_TEXT_ADDED_TOKENS_H_
#define QUANTMILL_CORE_TEXT_ADDED_TOKENS_H_

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace quantmill {

struct AddedToken {
  std::string content;
  int32_t id = 0;
  bool single_word = false;  // only where no word character touches it
  bool lstrip = false;       // takes the whitespace before it
  bool rstrip = false;       // takes the whitespace after it
  bool normalized = true;    // searched for after normalization
  bool special = false;      // left out of decoded text on request
};

// The "added_tokens" list; null = none.
absl::StatusOr<std::vector<AddedToken>> ReadAddedTokens(const nlohmann::json& json);

// Finds tokens of one set: leftmost, and of those the longest.
class AddedTokenFinder {
 public:
  explicit AddedTokenFinder(std::vector<AddedToken> tokens);

  struct Segment {
    std::string_view text;
    int32_t id = -1;  // of the token; -1: plain text
  };
  // The text cut into tokens and the (non-empty) stretches between them.
  std::vector<Segment> Split(std::string_view text) const;

 private:
  const AddedToken* MatchAt(std::string_view text, size_t position) const;

  std::vector<AddedToken> tokens_;
  std::array<std::vector<uint32_t>, 256> by_first_byte_;  // longest first
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TEXT_ADDED_TOKENS_H_
