// What the installed plugins offer, as plain data: read from manifests (NAME.qm.json beside the
// .so) or from a child process, without loading a plugin into this one.
#ifndef QUANTMILL_HOST_PLUGINS_CATALOG_H_
#define QUANTMILL_HOST_PLUGINS_CATALOG_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "quantmill/plugin.h"

namespace quantmill {

struct OptionInfo {
  std::string name;
  qm_option_type type = QM_OPT_STR;
  bool required = false;
  std::string default_value;
  std::string choices;  // as in qm_option
  std::string doc;
};

struct MethodInfo {
  std::string id, version, summary;
  uint64_t flags = 0;
  std::vector<OptionInfo> options;
  std::vector<std::string> capabilities;  // ids of tables it has: "qm.quantize-linear/1", ...
  // Formats this method owns (qm.format/1), with the checkpoint targets each can be stored as.
  struct Format {
    std::string id;
    std::vector<std::string> targets;
  };
  std::vector<Format> formats;
  bool Has(std::string_view capability) const;
};

struct PluginInfo {
  std::string path;    // absolute
  std::string sha256;  // of the file
  std::string vendor, license, build_info;
  uint32_t abi_major = 0, abi_minor = 0, min_host_minor = 0;
  std::vector<MethodInfo> methods;
  std::string rejected;  // why it cannot be used; empty = usable
};

struct Catalog {
  std::vector<PluginInfo> plugins;                          // usable and rejected, in search order
  std::vector<std::string> searched;                        // directories and files looked at
  const MethodInfo* FindMethod(std::string_view id) const;  // null if none
  const PluginInfo* FindPlugin(std::string_view method_id) const;
  std::vector<std::string> MethodIds() const;  // of methods a stage can use
  // Targets (checkpoint formats) that can hold `format_id`.
  std::vector<std::string> Targets(std::string_view format_id) const;
};

nlohmann::json ToJson(const PluginInfo& info);
absl::StatusOr<PluginInfo> PluginInfoFromJson(const nlohmann::json& json);

// Search order: `files` (--plugin, then the pipeline's `plugins`), $QUANTMILL_PLUGIN_PATH, the
// folder ../lib/quantmill/plugins beside this binary, in an installed tree as in a build. Unusable
// files are listed with their reason; two usable files that offer one method id are an error naming
// both.
absl::StatusOr<Catalog> DiscoverPlugins(const std::vector<std::string>& files);

// An error if one of the files somebody named was rejected; those merely found are left out
// silently.
absl::Status CheckNamedPlugins(const Catalog& catalog, const std::vector<std::string>& files);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PLUGINS_CATALOG_H_
