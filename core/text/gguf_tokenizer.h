// Tokenizers in GGUF files, as the tokenizer.json they would have, and the other way around
// (llama.cpp: src/llama-vocab.cpp, conversion/base.py; transformers:
// src/transformers/convert_slow_tokenizer.py).
#ifndef QUANTMILL_CORE_TEXT_GGUF_TOKENIZER_H_
#define QUANTMILL_CORE_TEXT_GGUF_TOKENIZER_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "core/io/gguf_file.h"
#include "core/io/gguf_writer.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// Values of tokenizer.ggml.token_type.
enum class GgufTokenType {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6
};

// A value of tokenizer.ggml.pre that stands for a way to cut text.
struct GgufPreTokenizer {
  std::vector<std::string_view> names;  // the first is written
  nlohmann::json json;                  // as "pre_tokenizer" of tokenizer.json
  bool nfc = false;                     // the original normalizes text
  bool ignore_merges = false;
  bool add_bos = false;  // unless tokenizer.ggml.add_bos_token says otherwise
};
const std::vector<GgufPreTokenizer>& GgufPreTokenizers();

// tokenizer.json of tokenizer.ggml.model "gpt2" (byte-level) and "llama" (SentencePiece).
// UNIMPLEMENTED lists the supported models or ways to cut text.
absl::StatusOr<nlohmann::json> TokenizerFromGguf(const GgufHeader& header);
// tokenizer_config.json: special tokens and the chat template.
nlohmann::ordered_json TokenizerConfigFromGguf(const GgufHeader& header);

// The keys under tokenizer. of a checkpoint's tokenizer.json and tokenizer_config.json (may be
// null). `vocab_size`: of the model; ids without a token are filled in. FAILED_PRECONDITION says
// what a GGUF file cannot express.
absl::StatusOr<GgufMetadata> GgufTokenizer(const nlohmann::json& tokenizer,
                                           const nlohmann::json& tokenizer_config,
                                           int64_t vocab_size);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TEXT_GGUF_TOKENIZER_H_
