// Text files as documents, and documents as windows of tokens.
#ifndef QUANTMILL_CORE_TEXT_DOCUMENTS_H_
#define QUANTMILL_CORE_TEXT_DOCUMENTS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/tensor/tensor.h"
#include "core/text/tokenizer.h"

namespace quantmill {

struct TextOptions {
  std::string key = "text";   // of JSON Lines
  std::string join = "\n\n";  // between documents
};

// Documents of a file, empty ones left out. What a file holds follows from its name (a ".gz" at the
// end is unpacked first):
//   .jsonl  one JSON object per line; the document is the string under `key`
//   .json   a list of alpaca records (instruction, input, output), put into alpaca's prompt, or of
//           objects with `key`
//   other   plain text; documents are separated by lines "<|endoftext|>" and do not include the
//           line end before such a line
// Errors name the file and the line or record; INVALID_ARGUMENT if there is no text at all.
absl::StatusOr<std::vector<std::string>> ReadDocuments(const std::string& path,
                                                       const TextOptions& options = {});

// Bytes of alpaca's prompt at the start of a document; 0 if it has none. What follows is the
// answer.
size_t PromptBytes(const std::string& document);

// The documents of a file, joined and tokenized as one text, without special tokens around it.
absl::StatusOr<std::vector<int32_t>> TokenizeFile(const Tokenizer& tokenizer,
                                                  const std::string& path,
                                                  const TextOptions& options = {});

struct WindowOptions {
  int64_t length = 2048;  // tokens each
  int64_t count = 0;      // 0 = as many consecutive windows as fit (order kStart only)
  enum class Order { kStart, kRandom };
  Order order = Order::kStart;
  uint64_t seed = 0;
};

// First tokens of the windows. kStart: 0, length, 2 * length, ... kRandom: start i is
// floor(r_i * (tokens - length + 1) / 2^64), r_i the i-th output of SplitMix64 seeded with `seed`
// (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 17), so
// windows may overlap. INVALID_ARGUMENT when the text is too short, saying what it would need.
absl::StatusOr<std::vector<int64_t>> WindowStarts(int64_t tokens, const WindowOptions& options);

// The windows as I32 [count, length] on the host.
absl::StatusOr<Tensor> CutWindows(absl::Span<const int32_t> tokens, const WindowOptions& options);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TEXT_DOCUMENTS_H_
