// Reads a plugin's descriptor in a process of its own: its static constructors may crash or hang.
#ifndef QUANTMILL_HOST_PLUGINS_INSPECT_CHILD_H_
#define QUANTMILL_HOST_PLUGINS_INSPECT_CHILD_H_

#include <string>

#include "absl/status/statusor.h"
#include "host/plugins/catalog.h"

namespace quantmill {

struct InspectResult {
  PluginInfo info;  // `rejected` says why when it cannot be used
  // The file itself is at fault, and would be again: worth remembering. A hang or a crash is not,
  // it may come from the state of the machine.
  bool lasting = true;
};

// Runs `program inspect --json - plugin` with a time limit. An error means that the child could not
// be started, not that the plugin is bad.
absl::StatusOr<InspectResult> InspectInChild(const std::string& program, const std::string& plugin,
                                             double time_limit_seconds);

// The quantmill binary: this process's own file, or bin/quantmill beside its folder when this is
// another program of the build (a test).
std::string QuantmillProgram();

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PLUGINS_INSPECT_CHILD_H_
