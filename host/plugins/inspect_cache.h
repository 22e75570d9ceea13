// Remembers what a plugin without a manifest said, so that it is not started again each time.
#ifndef QUANTMILL_HOST_PLUGINS_INSPECT_CACHE_H_
#define QUANTMILL_HOST_PLUGINS_INSPECT_CACHE_H_

#include <optional>
#include <string>

#include "host/plugins/catalog.h"

namespace quantmill {

// One file in $XDG_CACHE_HOME/quantmill/plugins (else ~/.cache/...), valid for a plugin's path,
// size, modification time and sha256 and this host's ABI. All failures are silent: it is a cache.
class InspectCache {
 public:
  InspectCache(const std::string& plugin, const std::string& sha256);
  std::optional<PluginInfo> Read() const;
  void Write(const PluginInfo& info) const;

 private:
  std::string plugin_;
  std::string file_;  // empty: no cache
  std::string key_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PLUGINS_INSPECT_CACHE_H_
