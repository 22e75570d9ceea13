// What a run will take and whether it can succeed, known before any work: sizes, memory, disk, the
// limits of the checkpoint format's readers.
#ifndef QUANTMILL_HOST_RUN_PREFLIGHT_H_
#define QUANTMILL_HOST_RUN_PREFLIGHT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/io/checkpoint_files.h"
#include "core/tensor/backend.h"
#include "host/pipeline/plan.h"
#include "host/run/stage_set.h"
#include "host/worker/formats.h"

namespace quantmill {

// Slots, bits, memory and disk of a pipeline on this backend.
absl::StatusOr<PlanReport> EstimateRun(const PipelinePlan& plan, const StageSet& stages,
                                       const Checkpoint& checkpoint, Backend& backend);

// Raises the peaks of the report to what evaluating `windows` windows takes, where that is more.
void AddEvaluation(const PipelinePlan& plan, const Checkpoint& checkpoint, int64_t windows,
                   Backend& backend, PlanReport* report);

// Fills report->seconds; the rest of the report is there. Uses the device for some milliseconds.
absl::Status EstimateTime(const PipelinePlan& plan, const StageSet& stages,
                          const Checkpoint& checkpoint, int64_t evaluation_windows,
                          Backend& backend, PlanReport* report);

// Memory and disk as they are now; 0 = unknown.
struct MachineState {
  int64_t host_bytes = 0;    // available, cgroup limits included
  int64_t device_bytes = 0;  // free on the backend's GPU
  int64_t work_disk_bytes = 0, output_disk_bytes = 0;
  bool one_disk = false;  // both directories lie on the same file system
};
MachineState ReadMachineState(const Pipeline& pipeline, Backend& backend);

// FAILED_PRECONDITION with one line per reason.
absl::Status CheckMachine(const PipelinePlan& plan, const PlanReport& report,
                          const MachineState& machine);

// Asks the export target about every slot that is packed.
absl::Status CheckCanStore(const PipelinePlan& plan, const StageSet& stages,
                           PluginFormats& formats);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_PREFLIGHT_H_
