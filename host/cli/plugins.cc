// quantmill plugins: what was found where, what was rejected and why.
#include <filesystem>
#include <ostream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/base/status.h"
#include "host/cli/command.h"
#include "host/cli/table.h"
#include "host/plugins/catalog.h"
#include "quantmill/all.h"

namespace quantmill {
namespace {

struct Summary {
  std::vector<std::string> methods, formats, kernels;
};

Summary Summarize(const PluginInfo& plugin) {
  Summary summary;
  for (const MethodInfo& method : plugin.methods) {
    if ((method.flags & QM_METHOD_NO_STAGE) == 0) summary.methods.push_back(method.id);
    if (method.Has(QM_EXT_LINEAR_KERNEL)) summary.kernels.push_back(method.id);
    for (const auto& format : method.formats) summary.formats.push_back(format.id);
  }
  return summary;
}

std::string OrDash(const std::vector<std::string>& list) {
  return list.empty() ? "-" : absl::StrJoin(list, ", ");
}

std::string Abi(const PluginInfo& plugin) {
  if (plugin.methods.empty()) return "-";
  return absl::StrCat(plugin.abi_major, ".", plugin.abi_minor);
}

nlohmann::ordered_json Json(const Catalog& catalog) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const PluginInfo& plugin : catalog.plugins) {
    const Summary summary = Summarize(plugin);
    list.push_back({{"file", plugin.path},
                    {"vendor", plugin.vendor},
                    {"methods", summary.methods},
                    {"formats", summary.formats},
                    {"kernels", summary.kernels},
                    {"abi", Abi(plugin)},
                    {"status", plugin.rejected.empty() ? "ok" : "rejected"},
                    {"reason", plugin.rejected}});
  }
  return {{"plugins", list}, {"searched", catalog.searched}};
}

absl::StatusOr<int> RunPluginsCommand(const Arguments& args) {
  QM_ASSIGN_OR_RETURN(const Catalog catalog, DiscoverPlugins(args.List("plugin")));
  std::vector<std::vector<std::string>> rows = {
      {"FILE", "METHODS", "FORMATS", "KERNELS", "ABI", "STATUS"}};
  for (const PluginInfo& plugin : catalog.plugins) {
    const Summary summary = Summarize(plugin);
    rows.push_back({std::filesystem::path(plugin.path).filename().string(), OrDash(summary.methods),
                    OrDash(summary.formats), OrDash(summary.kernels), Abi(plugin),
                    plugin.rejected.empty() ? "ok" : "rejected"});
  }
  std::ostream& out = args.out();
  if (catalog.plugins.empty()) {
    out << "No plugins found.\n";
  } else {
    out << FormatTable(rows);
  }
  for (const PluginInfo& plugin : catalog.plugins) {
    if (!plugin.rejected.empty())
      out << "\nrejected " << plugin.path << ": " << plugin.rejected << "\n";
  }
  out << "\nSearched:\n";
  for (const std::string& place : catalog.searched) {
    std::error_code error;
    out << "  " << place << (std::filesystem::exists(place, error) ? "" : " (does not exist)")
        << "\n";
  }
  QM_RETURN_IF_ERROR(args.WriteJson(Json(catalog)));
  return kExitDone;
}

}  // namespace

Command MakePluginsCommand() {
  return {.name = "plugins",
          .summary = "list the plugins found, what they offer, and why others were rejected",
          .options = {PluginOption()},
          .examples = {"quantmill plugins", "quantmill plugins --plugin ./libqm_mine.so --json -"},
          .notes =
              "Searched in this order: --plugin, $QUANTMILL_PLUGIN_PATH (files or folders, "
              "separated by ':'),\nthe installed folder ../lib/quantmill/plugins beside this "
              "program.",
          .run = RunPluginsCommand};
}

}  // namespace quantmill
