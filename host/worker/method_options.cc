#include "host/worker/method_options.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "core/base/nearest.h"
#include "core/base/status.h"
#include "host/plugins/option_value.h"

namespace quantmill {
namespace {

const OptionInfo* Find(const MethodInfo& method, const std::string& name) {
  for (const OptionInfo& option : method.options) {
    if (option.name == name) return &option;
  }
  return nullptr;
}

absl::Status UnknownOption(const MethodInfo& method, const std::string& name) {
  std::vector<std::string> names;
  for (const OptionInfo& option : method.options) names.push_back(option.name);
  return absl::InvalidArgumentError(
      ErrorText(absl::StrCat("method '", method.id, "' has no option '", name, "'"),
                names.empty() ? "it has no options" : NearestHint(name, names)));
}

}  // namespace

absl::StatusOr<std::map<std::string, std::string>> ParseOptions(
    const std::vector<std::string>& texts, const std::string& flag) {
  std::map<std::string, std::string> options;
  for (const std::string& text : texts) {
    const size_t equals = text.find('=');
    if (equals == std::string::npos || equals == 0) {
      return absl::InvalidArgumentError(absl::StrCat(flag, " wants NAME=VALUE, not '", text, "'"));
    }
    if (!options.emplace(text.substr(0, equals), text.substr(equals + 1)).second) {
      return absl::InvalidArgumentError(
          absl::StrCat("option '", text.substr(0, equals), "' is given twice"));
    }
  }
  return options;
}

absl::StatusOr<ResolvedOptions> OptionsFor(const MethodInfo& method,
                                           const std::map<std::string, std::string>& given) {
  for (const auto& [name, value] : given) {
    if (Find(method, name) == nullptr) return UnknownOption(method, name);
  }
  ResolvedOptions resolved;
  for (const OptionInfo& option : method.options) {
    const auto it = given.find(option.name);
    if (it == given.end() && option.required) {
      return absl::InvalidArgumentError(
          ErrorText(absl::StrCat("method '", method.id, "' needs the option '", option.name, "'"),
                    option.doc, absl::StrCat("add --option ", option.name, "=VALUE")));
    }
    const absl::StatusOr<std::string> value =
        CheckOptionValue(option, it == given.end() ? option.default_value : it->second);
    if (!value.ok()) return WithContext(value.status(), absl::StrCat("method '", method.id, "'"));
    resolved[option.name] = *value;
  }
  return resolved;
}

std::map<std::string, std::string> FittingOptions(const MethodInfo& method,
                                                  const std::map<std::string, std::string>& given) {
  std::map<std::string, std::string> fitting;
  for (const auto& [name, value] : given) {
    const OptionInfo* option = Find(method, name);
    if (option != nullptr && CheckOptionValue(*option, value).ok()) fitting[name] = value;
  }
  return fitting;
}

}  // namespace quantmill
