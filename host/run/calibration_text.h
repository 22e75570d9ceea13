// Token windows for calibration and evaluation, from a text file or from the model itself.
#ifndef QUANTMILL_HOST_RUN_CALIBRATION_TEXT_H_
#define QUANTMILL_HOST_RUN_CALIBRATION_TEXT_H_

#include <string>

#include "absl/status/statusor.h"
#include "core/model/weights.h"
#include "core/tensor/backend.h"
#include "host/pipeline/pipeline.h"
#include "host/supervisor/process.h"

namespace quantmill {

// I32 [samples, sequence_length] on the host. FAILED_PRECONDITION when the text is too short, with
// the number of tokens it has. `source` (the untouched model) is used for `self` text only, whose
// windows are kept in work_dir for a resumed run.
absl::StatusOr<Tensor> CalibrationWindows(const Pipeline& pipeline, WeightSource& source,
                                          Backend& backend, const EventSink& sink);

// Consecutive windows from the start of the evaluation text: all of them if windows is 0.
absl::StatusOr<Tensor> EvaluationWindows(const Pipeline& pipeline);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_CALIBRATION_TEXT_H_
