#include "sdk/check/option_variants.h"

#include <algorithm>
#include <charconv>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace quantmill::check {
namespace {

double NumberIn(std::string_view text, double otherwise) {
  double value = otherwise;
  std::from_chars(text.data(), text.data() + text.size(), value);
  return value;
}

// One more than the default, within "low..high"; "" is any number.
std::string NextInRange(const qm_option& option, std::string_view range,
                        const std::string& default_value) {
  const double next = NumberIn(default_value, 0.0) + 1.0;
  const std::string_view high = range.empty() ? range : range.substr(range.find("..") + 2);
  const double value = std::min(next, NumberIn(high, next));
  if (option.type == QM_OPT_I64) return absl::StrCat(static_cast<int64_t>(value));
  return absl::StrCat(value);
}

std::vector<std::string> OtherValues(const qm_option& option, const std::string& default_value) {
  const bool is_number = option.type == QM_OPT_I64 || option.type == QM_OPT_F64;
  const std::string_view choices = option.choices == nullptr ? "" : option.choices;
  if (option.type == QM_OPT_BOOL) return {default_value == "true" ? "false" : "true"};
  if (is_number && (choices.empty() || choices.find("..") != std::string_view::npos)) {
    return {NextInRange(option, choices, default_value)};
  }
  if (choices.empty() || option.type == QM_OPT_STR) return {};
  std::vector<std::string> values;
  for (const absl::string_view choice : absl::StrSplit(option.choices, '|')) {
    if (choice != default_value) values.emplace_back(choice);
  }
  return values;
}

// The values an option may be changed to, with everything else as by default.
void AddVariants(const qm_option& option, const OptionValues& defaults,
                 std::vector<OptionVariant>* variants) {
  const std::string& default_value = defaults.at(option.name);
  for (const std::string& value : OtherValues(option, default_value)) {
    if (value == default_value) continue;
    variants->push_back({absl::StrCat(option.name, ": ", value), defaults});
    variants->back().values[option.name] = value;
  }
}

}  // namespace

std::vector<OptionVariant> OptionVariants(const qm_method& method) {
  const OptionValues defaults = DefaultOptions(method);
  std::vector<OptionVariant> variants = {{"defaults", defaults}};
  for (uint64_t i = 0; i < method.option_count; ++i) {
    AddVariants(method.options[i], defaults, &variants);
  }
  return variants;
}

std::vector<OptionVariant> OptionVariants(const qm_method& method, qm_option_type type) {
  std::vector<OptionVariant> variants;
  for (uint64_t i = 0; i < method.option_count; ++i) {
    if (method.options[i].type != type) continue;
    AddVariants(method.options[i], DefaultOptions(method), &variants);
  }
  return variants;
}

}  // namespace quantmill::check
