#include "core/text/tokenizer.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/gguf_file.h"
#include "core/io/json.h"
#include "core/text/gguf_tokenizer.h"
#include "core/text/unicode.h"

namespace quantmill {
namespace {

using Json = nlohmann::json;

// Null where the key is absent.
const Json& Component(const Json& json, const char* key) {
  static const Json* const kNull = new Json(nullptr);
  const auto found = json.find(key);
  return found == json.end() ? *kNull : *found;
}

}  // namespace

Tokenizer::Tokenizer(std::vector<AddedToken> raw, std::vector<AddedToken> normalized)
    : raw_finder_(std::move(raw)), normalized_finder_(std::move(normalized)) {}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromDirectory(const std::string& directory) {
  QM_ASSIGN_OR_RETURN(const std::string gguf, FindGguf(directory));
  if (!gguf.empty()) return FromGguf(gguf);
  const std::filesystem::path base(directory);
  const std::string path = (base / "tokenizer.json").string();
  if (!FileExists(path) && FileExists((base / "tokenizer.model").string())) {
    return absl::NotFoundError(ErrorText(absl::StrCat("cannot read the tokenizer of ", directory),
                                         "it has tokenizer.model but no tokenizer.json",
                                         "save it as a fast tokenizer first"));
  }
  QM_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  return FromJson(text, path);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromGguf(const std::string& path) {
  QM_ASSIGN_OR_RETURN(const auto file, GgufFile::Open(path));
  const absl::StatusOr<Json> json = TokenizerFromGguf(file->header());
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer =
      json.ok() ? FromParsed(*json) : json.status();
  if (!tokenizer.ok()) {
    return WithContext(tokenizer.status(), absl::StrCat("cannot use the tokenizer of ", path));
  }
  return tokenizer;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromJson(std::string_view text,
                                                               std::string_view source) {
  QM_ASSIGN_OR_RETURN(const Json json, ParseJson(text, source));
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = FromParsed(json);
  if (!tokenizer.ok()) {
    return WithContext(tokenizer.status(), absl::StrCat("cannot use ", AbslView(source)));
  }
  return tokenizer;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromParsed(const Json& json) {
  if (!json.is_object()) {
    return absl::InvalidArgumentError(ErrorText("tokenizer.json is not a JSON object"));
  }
  QM_ASSIGN_OR_RETURN(const std::vector<AddedToken> added,
                      ReadAddedTokens(Component(json, "added_tokens")));
  QM_ASSIGN_OR_RETURN(Normalizer normalizer, Normalizer::FromJson(Component(json, "normalizer")));
  std::vector<AddedToken> raw, normalized;
  for (const AddedToken& token : added) {
    if (!token.normalized) {
      raw.push_back(token);
      continue;
    }
    normalized.push_back(token);
    QM_ASSIGN_OR_RETURN(normalized.back().content, normalizer.Apply(token.content));
  }
  std::unique_ptr<Tokenizer> tokenizer(new Tokenizer(std::move(raw), std::move(normalized)));
  tokenizer->normalizer_ = std::move(normalizer);
  QM_ASSIGN_OR_RETURN(tokenizer->pre_tokenizer_,
                      PreTokenizer::FromJson(Component(json, "pre_tokenizer")));
  QM_ASSIGN_OR_RETURN(
      tokenizer->model_,
      BpeModel::FromJson(Component(json, "model"), tokenizer->pre_tokenizer_.byte_level()));
  QM_ASSIGN_OR_RETURN(tokenizer->post_processor_,
                      PostProcessor::FromJson(Component(json, "post_processor")));
  QM_ASSIGN_OR_RETURN(tokenizer->decoder_, TokenDecoder::FromJson(Component(json, "decoder")));
  tokenizer->IndexTokens(added);
  return tokenizer;
}

void Tokenizer::IndexTokens(const std::vector<AddedToken>& added) {
  for (const auto& [token, id] : model_.vocabulary()) texts_[id] = token;
  for (const AddedToken& token : added) {
    texts_[token.id] = token.content;
    added_ids_[token.content] = token.id;
    if (token.special) special_.insert(token.id);
  }
  for (const auto& [id, token] : texts_)
    vocab_size_ = std::max<int64_t>(vocab_size_, id + int64_t{1});
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(std::string_view text,
                                                       bool add_special_tokens) const {
  std::string repaired;
  if (!IsUtf8(text)) {
    repaired = LossyUtf8(text);
    text = repaired;
  }
  std::vector<int32_t> ids;
  if (add_special_tokens) ids = post_processor_.before;
  BpeCache cache;
  for (const AddedTokenFinder::Segment& segment : raw_finder_.Split(text)) {
    if (segment.id >= 0) {
      ids.push_back(segment.id);
    } else {
      const bool at_start = segment.text.data() == text.data();
      QM_RETURN_IF_ERROR(EncodeStretch(segment.text, at_start, &cache, &ids));
    }
  }
  if (add_special_tokens) {
    ids.insert(ids.end(), post_processor_.after.begin(), post_processor_.after.end());
  }
  return ids;
}

absl::Status Tokenizer::EncodeStretch(std::string_view text, bool at_start, BpeCache* cache,
                                      std::vector<int32_t>* ids) const {
  QM_ASSIGN_OR_RETURN(const std::string normal, normalizer_.Apply(std::string(text)));
  for (const AddedTokenFinder::Segment& segment : normalized_finder_.Split(normal)) {
    if (segment.id >= 0) {
      ids->push_back(segment.id);
      continue;
    }
    PieceList list;
    list.pieces.push_back(segment.text);
    list.at_text_start = at_start && segment.text.data() == normal.data();
    QM_RETURN_IF_ERROR(pre_tokenizer_.Apply(&list));
    for (const std::string_view piece : list.pieces) model_.Encode(piece, cache, ids);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> Tokenizer::Decode(absl::Span<const int32_t> ids,
                                              bool skip_special) const {
  std::vector<std::string> tokens;
  for (const int32_t id : ids) {
    if (skip_special && IsSpecial(id)) continue;
    const auto found = texts_.find(id);
    if (found != texts_.end()) tokens.push_back(found->second);
  }
  return decoder_.Decode(std::move(tokens));
}

std::optional<int32_t> Tokenizer::TokenId(std::string_view token) const {
  for (const auto* map : {&added_ids_, &model_.vocabulary()}) {
    const auto found = map->find(AbslView(token));
    if (found != map->end()) return found->second;
  }
  return std::nullopt;
}

std::optional<std::string> Tokenizer::TokenText(int32_t id) const {
  const auto found = texts_.find(id);
  if (found == texts_.end()) return std::nullopt;
  return found->second;
}

}  // namespace quantmill
