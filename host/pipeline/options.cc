#include "host/pipeline/options.h"

#include "absl/strings/str_cat.h"
#include "core/base/nearest.h"
#include "core/base/status.h"
#include "host/plugins/option_value.h"

namespace quantmill {
namespace {

void ReportUnknown(const MethodInfo& method, const OptionMap& written, ErrorList* errors) {
  std::vector<std::string> names;
  for (const OptionInfo& option : method.options) names.push_back(option.name);
  for (const auto& [name, value] : written) {
    if (std::find(names.begin(), names.end(), name) != names.end()) continue;
    errors->Add(value.location,
                ErrorText(absl::StrCat("method '", method.id, "' has no option '", name, "'"),
                          names.empty() ? "it has no options" : NearestHint(name, names),
                          absl::StrCat("see quantmill describe ", method.id)));
  }
}

}  // namespace

ResolvedOptions ResolveOptions(const MethodInfo& method, const OptionMap& written,
                               const OptionMap& over, const SourceLocation& place,
                               ErrorList* errors) {
  ReportUnknown(method, written, errors);
  ReportUnknown(method, over, errors);
  ResolvedOptions resolved;
  for (const OptionInfo& option : method.options) {
    const OptionValue* value = nullptr;
    if (auto it = written.find(option.name); it != written.end()) value = &it->second;
    if (auto it = over.find(option.name); it != over.end()) value = &it->second;
    if (value == nullptr && option.required) {
      errors->Add(place, ErrorText(absl::StrCat("option '", option.name, "' of method '", method.id,
                                                "' is missing and has no default"),
                                   option.doc));
      continue;
    }
    const std::string& text = value == nullptr ? option.default_value : value->text;
    const auto checked = CheckOptionValue(option, text);
    if (checked.ok()) {
      resolved[option.name] = *checked;
    } else {
      errors->Add(value == nullptr ? place : value->location,
                  ErrorText(std::string(checked.status().message()), option.doc));
    }
  }
  return resolved;
}

}  // namespace quantmill
