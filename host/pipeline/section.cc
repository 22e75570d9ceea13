#include "host/pipeline/section.h"

#include <algorithm>
#include <set>
#include <tuple>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/base/nearest.h"
#include "core/base/status.h"

namespace quantmill {

void ErrorList::Add(const SourceLocation& location, const std::string& text) {
  errors_.emplace_back(location, text);
}

absl::Status ErrorList::ToStatus() const {
  if (errors_.empty()) return absl::OkStatus();
  auto sorted = errors_;
  std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) {
    return std::tie(a.first.line, a.first.column) < std::tie(b.first.line, b.first.column);
  });
  std::vector<std::string> lines;
  std::set<std::string> seen;
  for (const auto& [location, text] : sorted) {
    std::string line = absl::StrCat(location.ToString(), ": ", text);
    if (seen.insert(line).second) lines.push_back(std::move(line));
  }
  return absl::InvalidArgumentError(absl::StrJoin(lines, "\n"));
}

Section::Section(const YamlNode& node, std::string path, std::vector<std::string> known,
                 ErrorList* errors, std::map<std::string, SourceLocation>* locations)
    : node_(node), path_(std::move(path)), errors_(errors) {
  if (node.kind != YamlNode::Kind::kMap) {
    errors_->Add(
        node.location,
        absl::StrCat(path_.empty() ? "the pipeline" : absl::StrCat("'", path_, "'"),
                     " must be a map of ", absl::StrJoin(known, ", "), ", not ", KindName(node)));
    return;
  }
  for (const YamlNode::Entry& entry : node.entries) {
    if (std::find(known.begin(), known.end(), entry.key) == known.end()) {
      errors_->Add(entry.location,
                   ErrorText(absl::StrCat("unknown key '", entry.key, "'",
                                          path_.empty() ? "" : absl::StrCat(" in '", path_, "'")),
                             NearestHint(entry.key, known)));
    } else if (locations != nullptr) {
      (*locations)[KeyPath(entry.key)] = entry.value.location;
    }
  }
}

std::string Section::KeyPath(const std::string& key) const {
  return path_.empty() ? key : absl::StrCat(path_, ".", key);
}

void Section::Error(const std::string& key, const std::string& text) {
  const YamlNode* value = node_.Find(key);
  errors_->Add(value == nullptr ? node_.location : value->location, text);
}

const YamlNode* Section::Find(const std::string& key) const {
  const YamlNode* value = node_.Find(key);
  return value == nullptr || value->kind == YamlNode::Kind::kNull ? nullptr : value;
}

const YamlNode* Section::Require(const std::string& key, const std::string& why) {
  const YamlNode* value = Find(key);
  if (value == nullptr && node_.kind == YamlNode::Kind::kMap) {
    Error(key, ErrorText(absl::StrCat("'", KeyPath(key), "' is missing"), why));
  }
  return value;
}

const YamlNode* Section::Scalar(const std::string& key, const std::string& wanted) {
  const YamlNode* value = Find(key);
  if (value == nullptr || value->kind == YamlNode::Kind::kScalar) return value;
  Error(key, absl::StrCat("'", KeyPath(key), "' must be ", wanted, ", not ", KindName(*value)));
  return nullptr;
}

std::string Section::Text(const std::string& key, const std::string& fallback) {
  const YamlNode* value = Scalar(key, "a text");
  return value == nullptr ? fallback : value->text;
}

std::string Section::Choice(const std::string& key, const std::vector<std::string>& choices,
                            const std::string& fallback) {
  const YamlNode* value = Scalar(key, absl::StrJoin(choices, " or "));
  if (value == nullptr) return fallback;
  if (std::find(choices.begin(), choices.end(), value->text) != choices.end()) return value->text;
  const std::string nearest = NearestName(value->text, choices);
  Error(key, ErrorText(absl::StrCat("'", KeyPath(key), "' must be ", absl::StrJoin(choices, " or "),
                                    ", not '", value->text, "'"),
                       nearest.empty() ? "" : absl::StrCat("did you mean '", nearest, "'?")));
  return fallback;
}

int64_t Section::Integer(const std::string& key, int64_t fallback, int64_t least, int64_t most) {
  const YamlNode* value = Scalar(key, "a whole number");
  if (value == nullptr) return fallback;
  int64_t number = 0;
  if (!absl::SimpleAtoi(value->text, &number)) {
    Error(key, absl::StrCat("'", KeyPath(key), "' must be a whole number, not ", KindName(*value)));
    return fallback;
  }
  if (number >= least && number <= most) return number;
  Error(key,
        absl::StrCat("'", KeyPath(key), "' must be in ", least, " .. ", most, ", not ", number));
  return fallback;
}

bool Section::Bool(const std::string& key, bool fallback) {
  const YamlNode* value = Scalar(key, "true or false");
  if (value == nullptr) return fallback;
  const std::string lower = absl::AsciiStrToLower(value->text);
  if (lower == "true") return true;
  if (lower == "false") return false;
  Error(key, absl::StrCat("'", KeyPath(key), "' must be true or false, not ", KindName(*value)));
  return fallback;
}

int64_t Section::Bytes(const std::string& key, int64_t fallback) {
  const YamlNode* value = Scalar(key, "a number of bytes");
  if (value == nullptr) return fallback;
  static constexpr std::pair<const char*, double> kUnits[] = {
      {"KiB", 1024.0}, {"MiB", 1048576.0}, {"GiB", 1073741824.0}, {"TiB", 1099511627776.0},
      {"kB", 1e3},     {"MB", 1e6},        {"GB", 1e9},           {"TB", 1e12}};
  std::string digits = value->text;
  double factor = 1;
  for (const auto& [unit, size] : kUnits) {
    const std::string suffix = unit;
    if (digits.size() > suffix.size() &&
        digits.compare(digits.size() - suffix.size(), suffix.size(), suffix) == 0) {
      digits.resize(digits.size() - suffix.size());
      factor = size;
      break;
    }
  }
  double number = 0;
  constexpr double kMost = 1e15;
  if (absl::SimpleAtod(absl::StripAsciiWhitespace(digits), &number) && number >= 0 &&
      number * factor <= kMost) {
    return static_cast<int64_t>(number * factor);
  }
  Error(key, absl::StrCat("'", KeyPath(key), "' must be a size such as 6GiB, 500MB or a number of ",
                          "bytes, not ", KindName(*value)));
  return fallback;
}

std::vector<std::string> Section::List(const std::string& key,
                                       std::vector<SourceLocation>* locations) {
  const YamlNode* value = node_.Find(key);
  std::vector<std::string> texts;
  if (value == nullptr) return texts;
  auto take = [&](const YamlNode& item) {
    if (item.kind != YamlNode::Kind::kScalar) {
      errors_->Add(item.location, absl::StrCat("'", KeyPath(key), "' must be a list of texts; ",
                                               "this is ", KindName(item)));
      return;
    }
    texts.push_back(item.text);
    if (locations != nullptr) locations->push_back(item.location);
  };
  if (value->kind == YamlNode::Kind::kSequence) {
    for (const YamlNode& item : value->items) take(item);
    if (value->items.empty()) Error(key, absl::StrCat("'", KeyPath(key), "' is empty"));
  } else if (value->kind == YamlNode::Kind::kNull) {
    Error(key, absl::StrCat("'", KeyPath(key), "' is empty"));
  } else {
    take(*value);
  }
  return texts;
}

}  // namespace quantmill
