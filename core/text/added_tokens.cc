#include "core/text/added_tokens.h"

#include <algorithm>
#include <utility>

#include "core/base/status.h"
#include "core/text/components.h"
#include "core/text/unicode.h"

namespace quantmill {
namespace {

constexpr char kAddedTokensName[] = "added_tokens";

// Start of the last character of `text`, which is not empty.
size_t LastCharacter(std::string_view text) {
  size_t at = text.size() - 1;
  while (at > 0 && (static_cast<uint8_t>(text[at]) & 0xC0) == 0x80) --at;
  return at;
}

bool EndsWithWord(std::string_view text) {
  return !text.empty() && IsWordCharacter(CodePoint(text.substr(LastCharacter(text))));
}

bool StartsWithWord(std::string_view text) {
  return !text.empty() && IsWordCharacter(CodePoint(text.substr(0, CharacterLength(text))));
}

size_t WithoutTrailingSpace(std::string_view text) {
  while (!text.empty()) {
    const size_t last = LastCharacter(text);
    if (!IsWhitespace(CodePoint(text.substr(last)))) break;
    text = text.substr(0, last);
  }
  return text.size();
}

size_t LeadingSpace(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const size_t length = CharacterLength(text.substr(at));
    if (!IsWhitespace(CodePoint(text.substr(at, length)))) break;
    at += length;
  }
  return at;
}

absl::StatusOr<AddedToken> ReadToken(const nlohmann::json& json) {
  AddedToken token;
  if (!json.is_object())
    return BadComponent(kAddedTokensName, "has an entry that is not an object");
  QM_ASSIGN_OR_RETURN(token.content, StringField(json, "content", kAddedTokensName));
  const auto id = json.find("id");
  if (id == json.end() || !id->is_number_unsigned() || id->get<uint64_t>() > INT32_MAX) {
    return BadComponent(kAddedTokensName,
                        absl::StrCat("has no valid id for \"", token.content, "\""));
  }
  token.id = id->get<int32_t>();
  QM_ASSIGN_OR_RETURN(token.special, BoolField(json, "special", false, kAddedTokensName));
  QM_ASSIGN_OR_RETURN(token.single_word, BoolField(json, "single_word", false, kAddedTokensName));
  QM_ASSIGN_OR_RETURN(token.lstrip, BoolField(json, "lstrip", false, kAddedTokensName));
  QM_ASSIGN_OR_RETURN(token.rstrip, BoolField(json, "rstrip", false, kAddedTokensName));
  QM_ASSIGN_OR_RETURN(token.normalized,
                      BoolField(json, "normalized", !token.special, kAddedTokensName));
  return token;
}

}  // namespace

absl::StatusOr<std::vector<AddedToken>> ReadAddedTokens(const nlohmann::json& json) {
  std::vector<AddedToken> tokens;
  if (json.is_null()) return tokens;
  if (!json.is_array()) return BadComponent(kAddedTokensName, "is not a list");
  for (const nlohmann::json& item : json) {
    QM_ASSIGN_OR_RETURN(AddedToken token, ReadToken(item));
    if (!token.content.empty()) tokens.push_back(std::move(token));
  }
  return tokens;
}

AddedTokenFinder::AddedTokenFinder(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  for (uint32_t i = 0; i < tokens_.size(); ++i) {
    by_first_byte_[static_cast<uint8_t>(tokens_[i].content[0])].push_back(i);
  }
  for (std::vector<uint32_t>& candidates : by_first_byte_) {
    std::stable_sort(candidates.begin(), candidates.end(), [this](uint32_t a, uint32_t b) {
      return tokens_[a].content.size() > tokens_[b].content.size();
    });
  }
}

const AddedToken* AddedTokenFinder::MatchAt(std::string_view text, size_t position) const {
  for (const uint32_t index : by_first_byte_[static_cast<uint8_t>(text[position])]) {
    const AddedToken& token = tokens_[index];
    if (text.compare(position, token.content.size(), token.content) == 0) return &token;
  }
  return nullptr;
}

std::vector<AddedTokenFinder::Segment> AddedTokenFinder::Split(std::string_view text) const {
  std::vector<Segment> segments;
  size_t done = 0;
  for (size_t at = 0; !tokens_.empty() && at < text.size();) {
    const AddedToken* token = MatchAt(text, at);
    if (token == nullptr) {
      ++at;
      continue;
    }
    size_t begin = at, end = at + token->content.size();
    at = end;
    if (token->single_word &&
        (EndsWithWord(text.substr(0, begin)) || StartsWithWord(text.substr(end)))) {
      continue;
    }
    if (token->lstrip) begin = std::max(done, WithoutTrailingSpace(text.substr(0, begin)));
    if (token->rstrip) end += LeadingSpace(text.substr(end));
    if (done < begin) segments.push_back({text.substr(done, begin - done), -1});
    segments.push_back({text.substr(begin, end - begin), token->id});
    done = at = end;
  }
  if (done < text.size()) segments.push_back({text.substr(done), -1});
  return segments;
}

}  // namespace quantmill
