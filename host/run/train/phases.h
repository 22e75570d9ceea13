// The two phases of a training.
#ifndef QUANTMILL_HOST_RUN_TRAIN_PHASES_H_
#define QUANTMILL_HOST_RUN_TRAIN_PHASES_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "core/train/adamw.h"
#include "core/train/model_gradients.h"
#include "host/run/train/train_state.h"
#include "host/run/train/trained_slots.h"
#include "host/run/train/training.h"

namespace quantmill {

// What both phases work on.
struct TrainingRun {
  const TrainingInputs* in = nullptr;
  const TrainOptions* options = nullptr;
  TrainingOps* ops = nullptr;
  TrainedModel* student = nullptr;
  TrainedModel* teacher = nullptr;  // null where no phase needs it
  TrainedSlots* slots = nullptr;
  TrainState* state = nullptr;
  LossLog* log = nullptr;
  TrainPosition position;

  void Progress(const std::string& text, int64_t done, int64_t total) const {
    in->sink({{"type", "progress"},
              {"stage", in->stage->stage->name + ": " + text},
              {"unit", "step"},
              {"done", done},
              {"total", total}});
  }
};

// What `train` says of the optimizer; of the running mean, which only the end-to-end phase keeps,
// nothing.
inline AdamWOptions OptimizerOptions(const TrainOptions& train) {
  AdamWOptions adamw;
  adamw.decay = train.decay;
  adamw.clip_norm = train.clip_norm;
  adamw.beta1 = train.beta1;
  return adamw;
}

// Block by block: mean squared error of the block's output to the teacher's, over the mean square
// of that, the student on what its own blocks before give and the teacher on its own (EfficientQAT,
// Chen et al. 2024, section 3.2). `plans`: per slot, null: not in this phase.
absl::Status TrainBlocks(const std::vector<const ReparamPlan*>& plans, TrainingRun* run);

// The whole model on KL to the teacher, or the next token.
absl::Status TrainEndToEnd(const std::vector<const ReparamPlan*>& plans, TrainingRun* run);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TRAIN_PHASES_H_
