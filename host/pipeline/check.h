// Checks a pipeline against the plugins and the model before any work.
#ifndef QUANTMILL_HOST_PIPELINE_CHECK_H_
#define QUANTMILL_HOST_PIPELINE_CHECK_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/model/config.h"
#include "host/pipeline/plan.h"
#include "host/plugins/catalog.h"

namespace quantmill {

// Resolves every stage's methods, patterns and options against `catalog` and the model, and applies
// the rules of chaining: slot states, packing twice, what the export target can hold and fuses,
// group sizes, tensor parallelism. All errors are returned in one status, one per line:
// "file:line:column: what; why; remedy". Reads nothing but its arguments.
absl::StatusOr<PipelinePlan> CheckPipeline(const Pipeline& pipeline, const Catalog& catalog,
                                           const ModelConfig& config);

// What the file system has to say: the model directory and the texts exist, the output directory
// does not (unless `resume`), the work directory can be made. Errors as above.
absl::Status CheckFiles(const Pipeline& pipeline, bool resume);

// Called once the methods' plans are known: a stage whose method wants statistics needs a
// `calibration` section.
absl::Status CheckCalibration(const PipelinePlan& plan, const std::vector<SlotEstimate>& estimates);

// Checks that `target` can hold `format_id`, which `stage` emits: known once the methods' plans
// are.
absl::Status CheckExportFormats(const PipelinePlan& plan,
                                const std::vector<SlotEstimate>& estimates, const Catalog& catalog);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PIPELINE_CHECK_H_
