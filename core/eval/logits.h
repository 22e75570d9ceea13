// Logits of given token ids, for comparison with another engine.
#ifndef QUANTMILL_CORE_EVAL_LOGITS_H_
#define QUANTMILL_CORE_EVAL_LOGITS_H_

#include "absl/status/statusor.h"
#include "core/eval/stream.h"
#include "core/model/weights.h"
#include "core/tensor/backend.h"

namespace quantmill {

// ids: I32 [1, T] on the host. Returns F32 [T, vocab] on the host.
absl::StatusOr<Tensor> ComputeLogits(Backend& backend, WeightSource& model, const Tensor& ids,
                                     const StepProgress& progress = nullptr);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_EVAL_LOGITS_H_
