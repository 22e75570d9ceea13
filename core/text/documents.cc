#include "core/text/documents.h"

#include <zlib.h>

#include <algorithm>
#include <string_view>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_join.h"
#include "core/base/split_mix.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/json.h"

namespace quantmill {
namespace {

using Json = nlohmann::json;
using Documents = std::vector<std::string>;

constexpr std::string_view kSeparator = "<|endoftext|>";

absl::Status BadText(absl::string_view where, absl::string_view why,
                     absl::string_view remedy = "") {
  return absl::InvalidArgumentError(
      ErrorText(absl::StrCat("cannot read text from ", where), why, remedy));
}

// ---- unpacking

struct CloseGzip {
  void operator()(gzFile_s* file) const { gzclose_r(file); }
};

absl::StatusOr<std::string> ReadGzip(const std::string& path) {
  if (!FileExists(path)) return ReadFile(path).status();
  const std::unique_ptr<gzFile_s, CloseGzip> file(gzopen(path.c_str(), "rb"));
  if (file == nullptr) return BadText(path, "it cannot be opened");
  gzbuffer(file.get(), 1u << 18);
  std::string text, chunk(size_t{1} << 18, '\0');
  while (true) {
    const int got = gzread(file.get(), chunk.data(), static_cast<unsigned>(chunk.size()));
    if (got <= 0) break;
    text.append(chunk.data(), static_cast<size_t>(got));
  }
  int error = Z_OK;
  const char* message = gzerror(file.get(), &error);
  if (error != Z_OK && error != Z_STREAM_END) {
    return BadText(path, absl::StrCat("its gzip data are damaged or cut off (", message, ")"),
                   "download the file again");
  }
  if (gzdirect(file.get()) != 0 && !text.empty()) return BadText(path, "it is not a gzip file");
  return text;
}

// ---- formats

// Calls `line(number, text)` for every line, numbers from 1, line ends removed.
template <class Callback>
absl::Status ForEachLine(std::string_view text, const Callback& line) {
  for (int64_t number = 1; !text.empty(); ++number) {
    const size_t end = text.find('\n');
    std::string_view content = text.substr(0, end);
    if (!content.empty() && content.back() == '\r') content.remove_suffix(1);
    QM_RETURN_IF_ERROR(line(number, content));
    if (end == std::string_view::npos) break;
    text.remove_prefix(end + 1);
  }
  return absl::OkStatus();
}

std::string_view WithoutLineEnd(std::string_view text) {
  if (!text.empty() && text.back() == '\n') text.remove_suffix(1);
  if (!text.empty() && text.back() == '\r') text.remove_suffix(1);
  return text;
}

absl::StatusOr<Documents> ParsePlain(std::string_view text) {
  Documents documents;
  const auto add = [&documents](std::string_view document) {
    if (!document.empty()) documents.emplace_back(document);
  };
  size_t begin = 0;
  QM_RETURN_IF_ERROR(ForEachLine(text, [&](int64_t, std::string_view line) {
    if (line != kSeparator) return absl::OkStatus();
    const size_t at = static_cast<size_t>(line.data() - text.data());
    add(WithoutLineEnd(text.substr(begin, at - begin)));
    const size_t end = text.find('\n', at);
    begin = end == std::string_view::npos ? text.size() : end + 1;
    return absl::OkStatus();
  }));
  add(text.substr(begin));
  return documents;
}

std::string KeyList(const Json& object) {
  std::vector<std::string> keys;
  for (const auto& [key, value] : object.items()) keys.push_back(key);
  return absl::StrJoin(keys, ", ");
}

// The string under `key` of a record; `where` names the record.
absl::StatusOr<std::string> TextUnder(const Json& record, const std::string& key,
                                      const std::string& where) {
  if (!record.is_object()) return BadText(where, "it is not a JSON object");
  const auto found = record.find(key);
  if (found == record.end()) {
    return BadText(where, absl::StrCat("there is no key \"", key, "\""),
                   absl::StrCat("set `key` to one of: ", KeyList(record)));
  }
  if (!found->is_string()) return BadText(where, absl::StrCat("\"", key, "\" is not a string"));
  return found->get<std::string>();
}

absl::StatusOr<Documents> ParseJsonLines(std::string_view text, const std::string& path,
                                         const std::string& key) {
  Documents documents;
  QM_RETURN_IF_ERROR(ForEachLine(text, [&](int64_t number, std::string_view line) -> absl::Status {
    if (line.find_first_not_of(" \t") == std::string_view::npos) return absl::OkStatus();
    const std::string where = absl::StrCat(path, ":", number);
    QM_ASSIGN_OR_RETURN(const Json record, ParseJson(line, where));
    QM_ASSIGN_OR_RETURN(std::string document, TextUnder(record, key, where));
    if (!document.empty()) documents.push_back(std::move(document));
    return absl::OkStatus();
  }));
  return documents;
}

// Where alpaca's prompt begins and ends.
constexpr char kPromptStart[] = "Below is an instruction that describes a task";
constexpr char kPromptEnd[] = "\n\n### Response:\n";

// The prompt of the alpaca data set, with and without an input.
absl::StatusOr<std::string> AlpacaText(const Json& record, const std::string& where) {
  QM_ASSIGN_OR_RETURN(const std::string instruction, TextUnder(record, "instruction", where));
  QM_ASSIGN_OR_RETURN(const std::string output, TextUnder(record, "output", where));
  std::string input;
  if (record.contains("input")) {
    QM_ASSIGN_OR_RETURN(input, TextUnder(record, "input", where));
  }
  const absl::string_view opening =
      input.empty() ? ". " : ", paired with an input that provides further context. ";
  const std::string middle = input.empty() ? "" : absl::StrCat("\n\n### Input:\n", input);
  return absl::StrCat(kPromptStart, opening,
                      "Write a response that appropriately completes the request.\n\n",
                      "### Instruction:\n", instruction, middle, kPromptEnd, output);
}

absl::StatusOr<Documents> ParseRecords(std::string_view text, const std::string& path,
                                       const std::string& key) {
  QM_ASSIGN_OR_RETURN(const Json json, ParseJson(text, path));
  if (!json.is_array()) {
    return BadText(path, "it is not a JSON list of records", "use .jsonl for one object per line");
  }
  Documents documents;
  for (size_t i = 0; i < json.size(); ++i) {
    const std::string where = absl::StrCat(path, ", record ", i + 1);
    const bool alpaca = json[i].is_object() && json[i].contains("instruction");
    QM_ASSIGN_OR_RETURN(std::string document,
                        alpaca ? AlpacaText(json[i], where) : TextUnder(json[i], key, where));
    if (!document.empty()) documents.push_back(std::move(document));
  }
  return documents;
}

// ---- windows

absl::Status TooShort(int64_t tokens, const WindowOptions& options) {
  const int64_t count = std::max<int64_t>(1, options.count);
  const bool random = options.order == WindowOptions::Order::kRandom;
  return absl::InvalidArgumentError(
      ErrorText(absl::StrCat("text has ", tokens, " tokens, ", count, " window",
                             count == 1 ? "" : "s", " of ", options.length, " need ",
                             random ? options.length : count * options.length),
                "", "use a longer text, or fewer or shorter windows"));
}

}  // namespace

size_t PromptBytes(const std::string& document) {
  if (!absl::StartsWith(document, kPromptStart)) return 0;
  const size_t end = document.find(kPromptEnd);
  return end == std::string::npos ? 0 : end + sizeof(kPromptEnd) - 1;
}

absl::StatusOr<Documents> ReadDocuments(const std::string& path, const TextOptions& options) {
  const bool packed = absl::EndsWith(path, ".gz");
  const std::string name = packed ? path.substr(0, path.size() - 3) : path;
  QM_ASSIGN_OR_RETURN(const std::string text, packed ? ReadGzip(path) : ReadFile(path));
  absl::StatusOr<Documents> documents;
  if (absl::EndsWith(name, ".jsonl")) {
    documents = ParseJsonLines(text, path, options.key);
  } else if (absl::EndsWith(name, ".json")) {
    documents = ParseRecords(text, path, options.key);
  } else {
    if (text.find('\0') != std::string::npos) {
      return BadText(path, "it holds a NUL byte, so it is no text file",
                     "name a .txt, .jsonl, .jsonl.gz or .json file");
    }
    documents = ParsePlain(text);
  }
  if (documents.ok() && documents->empty()) return BadText(path, "there is no text in it");
  return documents;
}

absl::StatusOr<std::vector<int32_t>> TokenizeFile(const Tokenizer& tokenizer,
                                                  const std::string& path,
                                                  const TextOptions& options) {
  QM_ASSIGN_OR_RETURN(const Documents documents, ReadDocuments(path, options));
  return tokenizer.Encode(absl::StrJoin(documents, options.join), /*add_special_tokens=*/false);
}

absl::StatusOr<std::vector<int64_t>> WindowStarts(int64_t tokens, const WindowOptions& options) {
  if (options.length < 1 || options.count < 0) {
    return absl::InvalidArgumentError(ErrorText("windows need a positive length and count"));
  }
  const bool random = options.order == WindowOptions::Order::kRandom;
  if (random && options.count == 0) {
    return absl::InvalidArgumentError(ErrorText("random windows need a count"));
  }
  const int64_t fit = tokens / options.length;
  if (fit < (random ? 1 : std::max<int64_t>(1, options.count))) return TooShort(tokens, options);
  std::vector<int64_t> starts(static_cast<size_t>(options.count == 0 ? fit : options.count));
  SplitMix64 generator(options.seed);
  const auto choices = static_cast<uint64_t>(tokens - options.length + 1);
  for (size_t i = 0; i < starts.size(); ++i) {
    __extension__ using Wide = unsigned __int128;
    starts[i] = random ? static_cast<int64_t>(Wide{generator.Next()} * choices >> 64)
                       : static_cast<int64_t>(i) * options.length;
  }
  return starts;
}

absl::StatusOr<Tensor> CutWindows(absl::Span<const int32_t> tokens, const WindowOptions& options) {
  QM_ASSIGN_OR_RETURN(const std::vector<int64_t> starts,
                      WindowStarts(static_cast<int64_t>(tokens.size()), options));
  const auto count = static_cast<int64_t>(starts.size());
  QM_ASSIGN_OR_RETURN(Tensor windows, Tensor::Host(DType::kI32, Shape{count, options.length}));
  int32_t* out = windows.as<int32_t>();
  for (const int64_t start : starts) {
    out = std::copy_n(tokens.begin() + start, options.length, out);
  }
  return windows;
}

}  // namespace quantmill
