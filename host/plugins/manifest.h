// NAME.qm.json beside NAME.so: the descriptor as data, so that nobody need load the file to ask.
#ifndef QUANTMILL_HOST_PLUGINS_MANIFEST_H_
#define QUANTMILL_HOST_PLUGINS_MANIFEST_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "host/plugins/catalog.h"

namespace quantmill {

// "/a/libqm_gptq.so" -> "/a/libqm_gptq.qm.json"
std::string ManifestPath(const std::string& plugin);

// Loads the plugin into this process, writes its manifest beside it and returns the path.
absl::StatusOr<std::string> WriteManifest(const std::string& plugin);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PLUGINS_MANIFEST_H_
