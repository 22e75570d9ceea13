// Options of a method given on the command line as NAME=VALUE.
#ifndef QUANTMILL_HOST_WORKER_METHOD_OPTIONS_H_
#define QUANTMILL_HOST_WORKER_METHOD_OPTIONS_H_

#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "host/plugins/catalog.h"
#include "host/worker/call.h"

namespace quantmill {

// "bits=3" by name. INVALID_ARGUMENT for a text without '=' and for a name given twice. `flag` is
// where they were given, for messages.
absl::StatusOr<std::map<std::string, std::string>> ParseOptions(
    const std::vector<std::string>& texts, const std::string& flag = "--option");

// The values checked against the method's table, defaults filled in. INVALID_ARGUMENT for an
// unknown name (with the nearest), a value that does not fit, a required option that is missing.
absl::StatusOr<ResolvedOptions> OptionsFor(const MethodInfo& method,
                                           const std::map<std::string, std::string>& given);

// Those of `given` that the method has and would accept.
std::map<std::string, std::string> FittingOptions(const MethodInfo& method,
                                                  const std::map<std::string, std::string>& given);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_WORKER_METHOD_OPTIONS_H_
