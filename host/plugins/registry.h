// Plugins loaded into this process (worker, eval, generate). Loaded once, never unloaded
// (QM-H-003).
#ifndef QUANTMILL_HOST_PLUGINS_REGISTRY_H_
#define QUANTMILL_HOST_PLUGINS_REGISTRY_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "host/plugins/catalog.h"
#include "quantmill/all.h"

namespace quantmill {

struct LoadedMethod {
  const qm_plugin* plugin = nullptr;
  const qm_method* method = nullptr;
  std::string path;  // of the file
  // The capability's table, or null.
  template <typename Table>
  const Table* Ext(const char* id) const {
    return static_cast<const Table*>(method->ext(method, id));
  }
};

// dlopens one file, checks version before reading any other field, and returns its methods. The
// same path again returns the same methods.
absl::StatusOr<std::vector<LoadedMethod>> LoadPlugin(const std::string& path);

// Loads the plugins of `catalog` that own one of `method_ids`, or all usable ones if that is empty.
absl::StatusOr<std::vector<LoadedMethod>> LoadMethods(const Catalog& catalog,
                                                      const std::vector<std::string>& method_ids);

// The manifest of a plugin, by loading it into THIS process (quantmill inspect does so in a child).
absl::StatusOr<PluginInfo> DescribePlugin(const std::string& path);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PLUGINS_REGISTRY_H_
