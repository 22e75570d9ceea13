#include "core/text/answers.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/text/documents.h"

namespace quantmill {
namespace {

struct TokenizedRecord {
  std::vector<int32_t> ids;
  size_t prompt = 0;  // of them
};

// Tokenized as training does: as a whole, with as many tokens masked as the prompt alone has.
absl::StatusOr<TokenizedRecord> TokenizeRecord(const Tokenizer& tokenizer,
                                               const std::string& document, int32_t eos) {
  TokenizedRecord record;
  const size_t bytes = PromptBytes(document);
  if (bytes == 0 || bytes == document.size()) return record;
  QM_ASSIGN_OR_RETURN(record.ids, tokenizer.Encode(document, false));
  QM_ASSIGN_OR_RETURN(const std::vector<int32_t> prompt,
                      tokenizer.Encode(document.substr(0, bytes), false));
  record.prompt = std::min(prompt.size(), record.ids.size());
  if (eos >= 0) record.ids.push_back(eos);
  return record;
}

AnswerWindows Padded(const std::vector<TokenizedRecord>& records) {
  size_t longest = 0;
  for (const TokenizedRecord& record : records) longest = std::max(longest, record.ids.size());
  std::vector<int32_t> ids(records.size() * longest, 0), scored(ids.size(), 0);
  for (size_t r = 0; r < records.size(); ++r) {
    const TokenizedRecord& record = records[r];
    const auto row = static_cast<std::ptrdiff_t>(r * longest);
    const auto begin = static_cast<std::ptrdiff_t>(record.prompt);
    const auto end = static_cast<std::ptrdiff_t>(record.ids.size());
    std::copy(record.ids.begin(), record.ids.end(), ids.begin() + row);
    std::fill(scored.begin() + row + begin, scored.begin() + row + end, 1);
  }
  const Shape shape = {static_cast<int64_t>(records.size()), static_cast<int64_t>(longest)};
  AnswerWindows windows;
  windows.ids = Tensor::FromI32(shape, ids);
  windows.scored = Tensor::FromI32(shape, scored);
  return windows;
}

}  // namespace

absl::StatusOr<AnswerWindows> ReadAnswers(const Tokenizer& tokenizer, const std::string& path,
                                          const AnswerOptions& options) {
  QM_ASSIGN_OR_RETURN(std::vector<std::string> documents, ReadDocuments(path));
  const auto limit = static_cast<size_t>(options.length);
  if (options.count > 0 && static_cast<size_t>(options.count) < documents.size()) {
    documents.resize(static_cast<size_t>(options.count));
  }
  std::vector<TokenizedRecord> records;
  int64_t cut = 0;
  for (const std::string& document : documents) {
    QM_ASSIGN_OR_RETURN(TokenizedRecord record, TokenizeRecord(tokenizer, document, options.eos));
    if (record.ids.empty() || record.prompt >= std::min(limit, record.ids.size())) continue;
    if (record.ids.size() > limit) {
      record.ids.resize(limit);
      ++cut;
    }
    records.push_back(std::move(record));
  }
  if (records.empty()) {
    return absl::InvalidArgumentError(ErrorText(
        absl::StrCat("there are no answers to score in ", path),
        absl::StrCat("none of its ", documents.size(), " records is one of alpaca's (instruction, ",
                     "input, output) whose answer begins within ", options.length, " tokens"),
        "give a .json list of such records, or a longer context"));
  }
  AnswerWindows windows = Padded(records);
  windows.cut = cut;
  windows.left_out = static_cast<int64_t>(documents.size() - records.size());
  return windows;
}

}  // namespace quantmill
