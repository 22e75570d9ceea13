#include "core/text/pre_tokenizer.h"

#include <memory>
#include <optional>
#include <utility>

#include "core/base/status.h"
#include "core/text/components.h"

namespace quantmill {
namespace {

constexpr char kPreTokenizerName[] = "pre_tokenizer";

// huggingface/tokenizers: tokenizers/src/pre_tokenizers/byte_level.rs
constexpr char kGpt2Pattern[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// What becomes of a match (tokenizers/src/tokenizer/normalizer.rs, SplitDelimiterBehavior).
enum class Behavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext };

struct Part {
  size_t begin, end;
  bool match;
};

// Matches and the gaps between them, in order.
absl::StatusOr<std::vector<Part>> Parts(const Regex& pattern, std::string_view text, bool invert) {
  std::vector<Part> parts;
  size_t done = 0;
  QM_RETURN_IF_ERROR(pattern.ForEachMatch(text, [&](size_t begin, size_t end) {
    if (done < begin) parts.push_back({done, begin, invert});
    parts.push_back({begin, end, !invert});
    done = end;
  }));
  if (done < text.size()) parts.push_back({done, text.size(), invert});
  return parts;
}

// "the-final--end" with "-": [the-][final-][-][end]
std::vector<Part> MergeWithPrevious(const std::vector<Part>& parts) {
  std::vector<Part> merged;
  bool previous_match = false;
  for (const Part& part : parts) {
    if (part.match && !previous_match && !merged.empty()) {
      merged.back().end = part.end;
    } else {
      merged.push_back(part);
    }
    previous_match = part.match;
  }
  return merged;
}

// "the-final--end" with "-": [the][-final][-][-end]
std::vector<Part> MergeWithNext(const std::vector<Part>& parts) {
  std::vector<Part> merged;
  bool previous_match = false;
  for (const Part& part : parts) {
    if (!part.match && previous_match) {
      merged.back().end = part.end;
    } else {
      merged.push_back(part);
    }
    previous_match = part.match;
  }
  return merged;
}

absl::Status SplitPieces(const Regex& pattern, Behavior behavior, bool invert, PieceList* list) {
  std::vector<std::string_view> pieces;
  pieces.reserve(list->pieces.size());
  for (const std::string_view text : list->pieces) {
    QM_ASSIGN_OR_RETURN(std::vector<Part> parts, Parts(pattern, text, invert));
    if (behavior == Behavior::kMergedWithPrevious) parts = MergeWithPrevious(parts);
    if (behavior == Behavior::kMergedWithNext) parts = MergeWithNext(parts);
    for (const Part& part : parts) {
      if (behavior == Behavior::kRemoved && part.match) continue;
      pieces.push_back(text.substr(part.begin, part.end - part.begin));
    }
  }
  list->pieces = std::move(pieces);
  return absl::OkStatus();
}

absl::StatusOr<Behavior> BehaviorFromName(const std::string& name) {
  if (name == "Isolated") return Behavior::kIsolated;
  if (name == "Removed") return Behavior::kRemoved;
  if (name == "MergedWithPrevious") return Behavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return Behavior::kMergedWithNext;
  return UnknownComponent(absl::StrCat(kPreTokenizerName, " Split with behavior"), name);
}

void PrependSpaces(PieceList* list) {
  for (std::string_view& piece : list->pieces) {
    if (piece.front() != ' ')
      piece = list->storage.emplace_back(absl::StrCat(" ", AbslView(piece)));
  }
}

enum class Prepend { kAlways, kFirst, kNever };

absl::StatusOr<Prepend> PrependFromJson(const nlohmann::json& json) {
  if (!json.contains("prepend_scheme")) {  // older files
    QM_ASSIGN_OR_RETURN(const bool prefix,
                        BoolField(json, "add_prefix_space", true, kPreTokenizerName));
    return prefix ? Prepend::kAlways : Prepend::kNever;
  }
  QM_ASSIGN_OR_RETURN(const std::string scheme,
                      StringField(json, "prepend_scheme", kPreTokenizerName));
  if (scheme == "always") return Prepend::kAlways;
  if (scheme == "first") return Prepend::kFirst;
  if (scheme == "never") return Prepend::kNever;
  return UnknownComponent(absl::StrCat(kPreTokenizerName, " Metaspace with prepend_scheme"),
                          scheme);
}

}  // namespace

absl::StatusOr<PreTokenizer> PreTokenizer::FromJson(const nlohmann::json& json) {
  PreTokenizer result;
  if (!json.is_null()) QM_RETURN_IF_ERROR(result.Add(json));
  return result;
}

absl::Status PreTokenizer::Add(const nlohmann::json& json) {
  if (byte_level_) {
    return absl::UnimplementedError(
        ErrorText("tokenizer.json: pre_tokenizer ByteLevel is not the last of its sequence"));
  }
  QM_ASSIGN_OR_RETURN(const std::string type, ComponentType(json, kPreTokenizerName));
  if (type == "Split") return AddSplit(json);
  if (type == "ByteLevel") return AddByteLevel(json);
  if (type == "Digits") return AddDigits(json);
  if (type == "Metaspace") return AddMetaspace(json);
  if (type != "Sequence") return UnknownComponent(kPreTokenizerName, type);
  QM_ASSIGN_OR_RETURN(const auto* list, ListField(json, "pretokenizers", kPreTokenizerName));
  for (const nlohmann::json& item : *list) QM_RETURN_IF_ERROR(Add(item));
  return absl::OkStatus();
}

absl::Status PreTokenizer::AddSplit(const nlohmann::json& json) {
  QM_ASSIGN_OR_RETURN(const auto pattern, PatternField(json, kPreTokenizerName));
  QM_ASSIGN_OR_RETURN(const std::string name, StringField(json, "behavior", kPreTokenizerName));
  QM_ASSIGN_OR_RETURN(const Behavior behavior, BehaviorFromName(name));
  QM_ASSIGN_OR_RETURN(const bool invert, BoolField(json, "invert", false, kPreTokenizerName));
  steps_.push_back([pattern, behavior, invert](PieceList* list) {
    return SplitPieces(*pattern, behavior, invert, list);
  });
  return absl::OkStatus();
}

absl::Status PreTokenizer::AddByteLevel(const nlohmann::json& json) {
  QM_ASSIGN_OR_RETURN(const bool prefix,
                      BoolField(json, "add_prefix_space", true, kPreTokenizerName));
  QM_ASSIGN_OR_RETURN(const bool use_regex, BoolField(json, "use_regex", true, kPreTokenizerName));
  byte_level_ = true;
  if (prefix) {
    steps_.push_back([](PieceList* list) {
      PrependSpaces(list);
      return absl::OkStatus();
    });
  }
  if (!use_regex) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(const auto pattern, Regex::Compile(kGpt2Pattern));
  steps_.push_back([pattern](PieceList* list) {
    return SplitPieces(*pattern, Behavior::kIsolated, /*invert=*/false, list);
  });
  return absl::OkStatus();
}

absl::Status PreTokenizer::AddDigits(const nlohmann::json& json) {
  QM_ASSIGN_OR_RETURN(const bool each,
                      BoolField(json, "individual_digits", false, kPreTokenizerName));
  QM_ASSIGN_OR_RETURN(const auto pattern, Regex::Compile(each ? R"(\p{N})" : R"(\p{N}+)"));
  steps_.push_back([pattern](PieceList* list) {
    return SplitPieces(*pattern, Behavior::kIsolated, /*invert=*/false, list);
  });
  return absl::OkStatus();
}

absl::Status PreTokenizer::AddMetaspace(const nlohmann::json& json) {
  QM_ASSIGN_OR_RETURN(const std::string mark, StringField(json, "replacement", kPreTokenizerName));
  QM_ASSIGN_OR_RETURN(const Prepend prepend, PrependFromJson(json));
  QM_ASSIGN_OR_RETURN(const bool split, BoolField(json, "split", true, kPreTokenizerName));
  if (mark.empty()) return BadComponent(kPreTokenizerName, "Metaspace has an empty replacement");
  const auto space = Regex::Literal(" ");
  const auto marks = Regex::Literal(mark);
  steps_.push_back([mark, prepend, split, space, marks](PieceList* list) -> absl::Status {
    bool first = list->at_text_start;
    for (std::string_view& piece : list->pieces) {
      QM_ASSIGN_OR_RETURN(std::string text, ReplaceMatches(*space, piece, mark));
      const bool wanted = prepend == Prepend::kAlways || (prepend == Prepend::kFirst && first);
      if (wanted && text.compare(0, mark.size(), mark) != 0) text.insert(0, mark);
      piece = list->storage.emplace_back(std::move(text));
      first = false;
    }
    if (!split) return absl::OkStatus();
    return SplitPieces(*marks, Behavior::kMergedWithNext, /*invert=*/false, list);
  });
  return absl::OkStatus();
}

absl::Status PreTokenizer::Apply(PieceList* list) const {
  for (const Step& step : steps_) QM_RETURN_IF_ERROR(step(list));
  return absl::OkStatus();
}

}  // namespace quantmill
