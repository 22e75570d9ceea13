#include "host/plugins/option_value.h"

#include <charconv>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "core/base/nearest.h"
#include "core/base/status.h"

namespace quantmill {
namespace {

constexpr size_t kLongestValue = 4096;

struct Range {
  double low = -std::numeric_limits<double>::infinity();
  double high = std::numeric_limits<double>::infinity();
};

// "min..max", either end may be left out; nullopt when it is no range.
std::optional<Range> ParseRange(const std::string& choices) {
  const size_t dots = choices.find("..");
  if (dots == std::string::npos) return std::nullopt;
  Range range;
  const std::string low = choices.substr(0, dots), high = choices.substr(dots + 2);
  if (!low.empty() && !absl::SimpleAtod(low, &range.low)) return std::nullopt;
  if (!high.empty() && !absl::SimpleAtod(high, &range.high)) return std::nullopt;
  if (!(range.low <= range.high)) return std::nullopt;
  return range;
}

std::vector<std::string> ParseSet(const std::string& choices) {
  return absl::StrSplit(choices, '|');
}

absl::Status CheckNumber(const OptionInfo& option, double value, const std::string& text) {
  if (option.choices.empty()) return absl::OkStatus();
  if (const auto range = ParseRange(option.choices)) {
    if (value >= range->low && value <= range->high) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(option.name, " must be in ", option.choices, ", not ", text));
  }
  for (const std::string& choice : ParseSet(option.choices)) {
    double allowed = 0;
    if (absl::SimpleAtod(choice, &allowed) && allowed == value) return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(option.name, " must be one of ",
                                                 absl::StrReplaceAll(option.choices, {{"|", ", "}}),
                                                 ", not ", text));
}

absl::StatusOr<std::string> CheckInteger(const OptionInfo& option, const std::string& text) {
  int64_t value = 0;
  if (!absl::SimpleAtoi(text, &value)) {
    return absl::InvalidArgumentError(
        absl::StrCat(option.name, " wants a whole number, not '", text, "'"));
  }
  QM_RETURN_IF_ERROR(CheckNumber(option, static_cast<double>(value), text));
  return absl::StrCat(value);
}

absl::StatusOr<std::string> CheckReal(const OptionInfo& option, const std::string& text) {
  double value = 0;
  if (!absl::SimpleAtod(text, &value) || !std::isfinite(value)) {
    return absl::InvalidArgumentError(
        absl::StrCat(option.name, " wants a number, not '", text, "'"));
  }
  QM_RETURN_IF_ERROR(CheckNumber(option, value, text));
  char buffer[64];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value);
  return std::string(buffer, end.ptr);
}

absl::StatusOr<std::string> CheckBool(const OptionInfo& option, const std::string& text) {
  const std::string lower = absl::AsciiStrToLower(text);
  if (lower == "true" || lower == "yes" || lower == "on" || lower == "1") return "true";
  if (lower == "false" || lower == "no" || lower == "off" || lower == "0") return "false";
  return absl::InvalidArgumentError(
      absl::StrCat(option.name, " wants true or false, not '", text, "'"));
}

absl::StatusOr<std::string> CheckEnum(const OptionInfo& option, const std::string& text) {
  const std::vector<std::string> choices = ParseSet(option.choices);
  for (const std::string& choice : choices) {
    if (choice == text) return text;
  }
  const std::string nearest = NearestName(text, choices);
  return absl::InvalidArgumentError(ErrorText(
      absl::StrCat(option.name, " must be one of ",
                   absl::StrReplaceAll(option.choices, {{"|", ", "}}), ", not '", text, "'"),
      "", nearest.empty() ? "" : absl::StrCat("did you mean '", nearest, "'?")));
}

absl::Status CheckChoices(const OptionInfo& option) {
  const bool number = option.type == QM_OPT_I64 || option.type == QM_OPT_F64;
  if (option.type == QM_OPT_ENUM && option.choices.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("option ", option.name, " lists no choices"));
  }
  if (!number || option.choices.empty() || ParseRange(option.choices)) return absl::OkStatus();
  for (const std::string& choice : ParseSet(option.choices)) {
    double value = 0;
    if (absl::SimpleAtod(choice, &value)) continue;
    return absl::InvalidArgumentError(absl::StrCat("option ", option.name, " has choices '",
                                                   option.choices,
                                                   "', which are neither min..max nor a|b|c"));
  }
  return absl::OkStatus();
}

}  // namespace

std::string OptionTypeName(qm_option_type type) {
  switch (type) {
    case QM_OPT_I64:
      return "i64";
    case QM_OPT_F64:
      return "f64";
    case QM_OPT_STR:
      return "string";
    case QM_OPT_ENUM:
      return "enum";
    case QM_OPT_BOOL:
      return "bool";
    default:
      return "?";
  }
}

absl::StatusOr<std::string> CheckOptionValue(const OptionInfo& option, const std::string& text) {
  if (text.size() > kLongestValue) {
    return absl::InvalidArgumentError(absl::StrCat(option.name, " has a value of ", text.size(),
                                                   " characters; the limit is ", kLongestValue));
  }
  switch (option.type) {
    case QM_OPT_I64:
      return CheckInteger(option, text);
    case QM_OPT_F64:
      return CheckReal(option, text);
    case QM_OPT_BOOL:
      return CheckBool(option, text);
    case QM_OPT_ENUM:
      return CheckEnum(option, text);
    default:
      return text;
  }
}

absl::Status CheckOptionInfo(const OptionInfo& option) {
  if (option.name.empty()) return absl::InvalidArgumentError("an option has no name");
  if (OptionTypeName(option.type) == "?") {
    return absl::InvalidArgumentError(
        absl::StrCat("option ", option.name, " has the unknown type ", option.type));
  }
  QM_RETURN_IF_ERROR(CheckChoices(option));
  if (option.required) return absl::OkStatus();
  const auto value = CheckOptionValue(option, option.default_value);
  if (value.ok()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("the default of option ", option.name,
                   " does not fit: ", std::string(value.status().message())));
}

}  // namespace quantmill
