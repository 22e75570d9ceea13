// Alpaca records as windows of which only the answers are scored.
#ifndef QUANTMILL_CORE_TEXT_ANSWERS_H_
#define QUANTMILL_CORE_TEXT_ANSWERS_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "core/tensor/tensor.h"
#include "core/text/tokenizer.h"

namespace quantmill {

struct AnswerOptions {
  int64_t length = 2048;  // at most so many tokens of a record; what is longer is cut
  int64_t count = 0;      // records from the start; 0 = all
  int32_t eos = -1;       // behind every answer, and part of it; negative: none
};

struct AnswerWindows {
  Tensor ids;       // I32 [records, T] on the host, T the longest record; shorter ones end in zeros
  Tensor scored;    // I32 like ids: 1 for tokens of an answer, else 0
  int64_t cut = 0;  // records of which a part of the answer does not fit
  int64_t left_out = 0;  // records of which nothing of the answer does, or with an empty answer
};

// A .json file of alpaca records, each in a window of its own, its prompt before its answer.
// INVALID_ARGUMENT when the file has no such records or no answer is left; other errors as
// ReadDocuments.
absl::StatusOr<AnswerWindows> ReadAnswers(const Tokenizer& tokenizer, const std::string& path,
                                          const AnswerOptions& options);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TEXT_ANSWERS_H_
