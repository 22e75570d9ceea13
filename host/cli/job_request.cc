#include "host/cli/job_request.h"

#include "host/pipeline/device.h"

namespace quantmill {

absl::StatusOr<JobRequest> JobRequestOf(const Arguments& args) {
  JobRequest request;
  request.pipeline_file = args.Text("PIPELINE");
  request.sets = args.List("set");
  request.plugins = args.List("plugin");
  if (args.Has("device")) {
    request.device = args.Text("device");
    const auto device = ParseDevice(request.device);
    if (!device.ok()) return UsageError(device.status());
  }
  request.work_dir = args.Text("work-dir");
  request.resume = args.Flag("resume");
  return request;
}

}  // namespace quantmill
