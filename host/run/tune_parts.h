// What a tuning is made of and judged by, for runs and for calls made again: the dense parts of a
// task, checks of what came back, and the block's error before and after.
#ifndef QUANTMILL_HOST_RUN_TUNE_PARTS_H_
#define QUANTMILL_HOST_RUN_TUNE_PARTS_H_

#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/formats/packed.h"
#include "core/model/block_edits.h"
#include "core/model/config.h"
#include "core/model/weights.h"
#include "core/tensor/backend.h"
#include "host/run/tune_runner.h"

namespace quantmill {

// task.block is set: its dense weights, and the block's norms and biases, as F32 on the backend.
absl::Status AddDenseParts(const ModelConfig& config, const BlockWeights& dense, Backend& backend,
                           TuneTask* task);

// The formats' checks of what was emitted, and edits: of norms and biases alone. `editor`: of the
// block with the weights `dense`. *changed gets the names of tensors that edits change.
absl::Status CheckTuned(const ModelConfig& config, const BlockEditor& editor,
                        const BlockWeights& dense, FormatRegistry& formats, const TuneTask& task,
                        const TuneOutcome& outcome, std::set<std::string>* changed);

// What tuning changed, measured.
struct TuneComparison {
  // Mean squared error of the block on the first windows, as packed and as tuned.
  double loss_before = -1, loss_after = -1;
  std::vector<double> weight_nmse;  // per slot, after; of tuned ones
  bool better() const { return loss_after <= loss_before; }
};
// task.trials is set. INTERNAL: a tuned weight is not finite.
absl::StatusOr<TuneComparison> CompareTuned(Backend& backend, FormatRegistry& formats,
                                            const TuneTask& task, const TuneOutcome& outcome);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TUNE_PARTS_H_
