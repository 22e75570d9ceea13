// Does an edited block still compute what it computed?
#ifndef QUANTMILL_HOST_RUN_PRESERVATION_H_
#define QUANTMILL_HOST_RUN_PRESERVATION_H_

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "core/model/block_edits.h"
#include "core/model/weights.h"
#include "core/tensor/backend.h"

namespace quantmill {

// Relative error (root of squared difference over squared value) that a half of the block may show
// when it is run in f32. Edited tensors are f32, too, so the checkpoint's 16 bits play no part.
inline constexpr double kPreservedError = 1e-5;

// Runs both halves of the block, and its router, before and after the edits that preserve the
// function (others are left out), on hidden states [rows, hidden] in F32. FAILED_PRECONDITION names
// the first site whose edit alone does not preserve.
absl::Status CheckPreserved(const ModelConfig& config, int64_t block, const BlockEditor& editor,
                            const BlockWeights& weights, absl::Span<const BlockEdit> edits,
                            const Tensor& hidden, Backend& backend);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_PRESERVATION_H_
