#include "host/plugins/manifest.h"

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "host/plugins/registry.h"

namespace quantmill {

std::string ManifestPath(const std::string& plugin) {
  const bool so = absl::EndsWith(plugin, ".so");
  return absl::StrCat(plugin.substr(0, plugin.size() - (so ? 3 : 0)), ".qm.json");
}

absl::StatusOr<std::string> WriteManifest(const std::string& plugin) {
  QM_ASSIGN_OR_RETURN(const PluginInfo info, DescribePlugin(plugin));
  const std::string path = ManifestPath(plugin);
  QM_RETURN_IF_ERROR(WriteFile(path, ToJson(info).dump(1) + "\n"));
  return path;
}

}  // namespace quantmill
