// quantmill describe METHOD: options, capabilities, formats.
#include <ostream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "core/base/nearest.h"
#include "core/base/status.h"
#include "host/cli/command.h"
#include "host/cli/table.h"
#include "host/pipeline/methods.h"
#include "host/plugins/option_value.h"
#include "quantmill/all.h"

namespace quantmill {
namespace {

std::string Choices(const OptionInfo& option) {
  return absl::StrReplaceAll(option.choices, {{"|", ", "}, {"..", " .. "}});
}

std::string OptionTable(const MethodInfo& method) {
  if (method.options.empty()) return "It has no options.\n";
  std::vector<std::vector<std::string>> rows = {{"OPTION", "TYPE", "DEFAULT", "VALUES", "MEANING"}};
  for (const OptionInfo& option : method.options) {
    rows.push_back({option.name, OptionTypeName(option.type),
                    option.required ? "(required)" : option.default_value, Choices(option),
                    option.doc});
  }
  return FormatTable(rows);
}

nlohmann::ordered_json Json(const MethodInfo& method, const PluginInfo& plugin) {
  nlohmann::ordered_json options = nlohmann::ordered_json::array();
  for (const OptionInfo& option : method.options) {
    nlohmann::ordered_json entry = {{"name", option.name},
                                    {"type", OptionTypeName(option.type)},
                                    {"required", option.required ? 1 : 0}};
    if (!option.required) entry["default"] = option.default_value;
    entry["values"] = option.choices;
    entry["doc"] = option.doc;
    options.push_back(std::move(entry));
  }
  std::vector<std::string> formats, targets;
  for (const auto& format : method.formats) {
    formats.push_back(format.id);
    targets.insert(targets.end(), format.targets.begin(), format.targets.end());
  }
  return {{"id", method.id},
          {"version", method.version},
          {"summary", method.summary},
          {"file", plugin.path},
          {"vendor", plugin.vendor},
          {"license", plugin.license},
          {"deterministic", (method.flags & QM_METHOD_DETERMINISTIC) != 0 ? 1 : 0},
          {"capabilities", method.capabilities},
          {"formats", formats},
          {"targets", targets},
          {"options", options}};
}

// Also methods that cannot be a stage, and "awq.scale" for awq.
absl::StatusOr<const MethodInfo*> Find(const Catalog& catalog, const std::string& name) {
  if (const MethodInfo* method = catalog.FindMethod(name)) return method;
  QM_ASSIGN_OR_RETURN(const MethodUse use, FindUse(catalog, name));
  return use.method;
}

absl::StatusOr<int> RunDescribeCommand(const Arguments& args) {
  QM_ASSIGN_OR_RETURN(const Catalog catalog, DiscoverPlugins(args.List("plugin")));
  const absl::StatusOr<const MethodInfo*> found = Find(catalog, args.Text("METHOD"));
  if (!found.ok()) return UsageError(found.status());
  const MethodInfo& method = **found;
  const PluginInfo& plugin = *catalog.FindPlugin(method.id);
  std::ostream& out = args.out();
  out << method.id << " " << method.version << ": " << method.summary << "\n"
      << "plugin       " << plugin.path << "\n"
      << "vendor       " << plugin.vendor << " (" << plugin.license << ")\n"
      << "capabilities " << absl::StrJoin(method.capabilities, ", ") << "\n";
  for (const auto& format : method.formats) {
    out << "format       " << format.id << ", stored as " << absl::StrJoin(format.targets, ", ")
        << "\n";
  }
  out << "\n" << OptionTable(method);
  QM_RETURN_IF_ERROR(args.WriteJson(Json(method, plugin)));
  return kExitDone;
}

}  // namespace

Command MakeDescribeCommand() {
  return {.name = "describe",
          .summary = "show a method's options with types, values and defaults",
          .arguments = {{"METHOD", "id of a method, e.g. gptq"}},
          .options = {PluginOption()},
          .examples = {"quantmill describe gptq", "quantmill describe ptq --json ptq.json"},
          .run = RunDescribeCommand};
}

}  // namespace quantmill
