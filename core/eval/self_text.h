// Calibration text drawn from the model itself, so that a run needs no data.
#ifndef QUANTMILL_CORE_EVAL_SELF_TEXT_H_
#define QUANTMILL_CORE_EVAL_SELF_TEXT_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "core/eval/resident_model.h"

namespace quantmill {

// Token windows I32 [samples, length] on the host. Every window begins with the beginning-of-text
// token, or, when the model has none, with a token drawn uniformly, and is continued by sampling at
// temperature 1. Special tokens (beginning and end of text) are never sampled: a calibration text
// has none either. Window i depends on seed and i alone up to rounding. One progress step per
// position of a batch.
absl::StatusOr<Tensor> SampleSelfText(const ResidentModel& model, int64_t samples, int64_t length,
                                      uint64_t seed, const StepProgress& progress = nullptr);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_EVAL_SELF_TEXT_H_
