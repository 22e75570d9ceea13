// What a run asks of the edits that a transform proposes, before it applies them.
#ifndef QUANTMILL_HOST_RUN_EDIT_CHECK_H_
#define QUANTMILL_HOST_RUN_EDIT_CHECK_H_

#include <cstdint>
#include <set>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/model/block_edits.h"
#include "core/model/weights.h"
#include "core/tensor/backend.h"
#include "host/run/transform_runner.h"

namespace quantmill {

// Hidden states that an edited block is checked on, F32 on the backend's device: the first rows of
// a window of calibration text; made up, the same every time, if `window` is null.
absl::StatusOr<Tensor> CheckedInput(const Tensor* window, int64_t hidden_size, Backend& backend);

// Targets, shapes and values; that nothing outside of the stage's linears is reached; that edits
// which preserve the function preserve it on `input`. The names of changed tensors go to *changed.
absl::Status CheckEdits(const ModelConfig& config, const TransformBlock& block,
                        const BlockEditor& editor, const BlockWeights& weights,
                        absl::Span<const BlockEdit> edits, const Tensor& input, Backend& backend,
                        std::set<std::string>* changed);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_EDIT_CHECK_H_
