// Tokenizers of Hugging Face checkpoints, read from tokenizer.json: byte-level BPE (Llama-3, Qwen,
// SmolLM, ...) and SentencePiece-style BPE with byte fallback (Llama-2, Mistral). Ids are those of
// huggingface/tokenizers.
#ifndef QUANTMILL_CORE_TEXT_TOKENIZER_H_
#define QUANTMILL_CORE_TEXT_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/text/added_tokens.h"
#include "core/text/bpe.h"
#include "core/text/decoder.h"
#include "core/text/normalizer.h"
#include "core/text/post_processor.h"
#include "core/text/pre_tokenizer.h"

namespace quantmill {

// Immutable; used from any thread.
class Tokenizer {
 public:
  // Reads DIRECTORY/tokenizer.json; of a GGUF file, or a directory with one, the metadata.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromDirectory(const std::string& directory);
  // `source` names the text in errors. UNIMPLEMENTED names a component that is not supported.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromJson(std::string_view text,
                                                             std::string_view source);

  // Ill-formed UTF-8 is read as U+FFFD. With `add_special_tokens`, the tokens that the file's
  // post-processor puts around a text (a BOS) are added.
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text, bool add_special_tokens) const;
  // Ids that no token has are left out. The result is UTF-8.
  absl::StatusOr<std::string> Decode(absl::Span<const int32_t> ids, bool skip_special) const;

  std::optional<int32_t> TokenId(std::string_view token) const;
  // As written in the file; nullopt if no token has this id.
  std::optional<std::string> TokenText(int32_t id) const;
  bool IsSpecial(int32_t id) const { return special_.contains(id); }
  // Highest id + 1.
  int64_t vocab_size() const { return vocab_size_; }

 private:
  Tokenizer(std::vector<AddedToken> raw, std::vector<AddedToken> normalized);

  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromGguf(const std::string& path);
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromParsed(const nlohmann::json& json);
  void IndexTokens(const std::vector<AddedToken>& added);
  absl::Status EncodeStretch(std::string_view text, bool at_start, BpeCache* cache,
                             std::vector<int32_t>* ids) const;

  AddedTokenFinder raw_finder_;         // searched in the text as given
  AddedTokenFinder normalized_finder_;  // searched after normalization
  Normalizer normalizer_;
  PreTokenizer pre_tokenizer_;
  BpeModel model_;
  PostProcessor post_processor_;
  TokenDecoder decoder_;
  absl::flat_hash_map<std::string, int32_t> added_ids_;
  absl::flat_hash_map<int32_t, std::string> texts_;
  absl::flat_hash_set<int32_t> special_;
  int64_t vocab_size_ = 0;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TEXT_TOKENIZER_H_
