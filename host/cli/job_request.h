// The command line of `run` and `plan` as a job.
#ifndef QUANTMILL_HOST_CLI_JOB_REQUEST_H_
#define QUANTMILL_HOST_CLI_JOB_REQUEST_H_

#include "absl/status/statusor.h"
#include "host/cli/command.h"
#include "host/run/job.h"

namespace quantmill {

// PIPELINE, --set, --plugin, --device, --work-dir and --resume. A device that is not one is a usage
// error.
absl::StatusOr<JobRequest> JobRequestOf(const Arguments& args);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_CLI_JOB_REQUEST_H_
