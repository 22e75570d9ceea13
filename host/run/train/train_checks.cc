#include "host/run/train/train_checks.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/checkpoint/peft_adapter.h"
#include "core/train/block_gradients.h"

namespace quantmill {

// What a training holds: both models as they compute, of every trained weight six copies in f32
// (values, optimizer, gradients), activations and their gradients, logits of some rows.
int64_t TrainingBytes(const PipelinePlan& plan, const PreparedStage& stage, DType activation,
                      int64_t model_bytes) {
  constexpr int64_t kCopies = 6, kLogitCopies = 4, kLogits = int64_t{1} << 24;
  const TrainOptions& train = *stage.stage->train;
  const int64_t rows = train.MicroBatch() * train.sequence_length;
  int64_t bytes = model_bytes * (train.distill || stage.HasPhase(QM_PHASE_BLOCK) ? 2 : 1);
  for (size_t i = 0; i < stage.stage->slots.size(); ++i) {
    const ReparamPlan* slot_plan = stage.AnyPlan(i);
    if (slot_plan == nullptr) continue;
    const LinearSlot& slot = plan.slots[static_cast<size_t>(stage.stage->slots[i])];
    int64_t values =
        slot_plan->kind == QM_REPARAM_WEIGHT ? slot.out_features * slot.in_features : 0;
    for (const ReparamPlan::Param& param : slot_plan->params) {
      values += param.shape.elements();
    }
    bytes += kCopies * 4 * values + static_cast<int64_t>(slot_plan->SavedBytes(rows));
  }
  const int64_t tapes = train.checkpointing ? 1 : plan.config.layers;
  bytes +=
      tapes * TapeBytes(plan.config, rows, activation) + TapeBytes(plan.config, rows, DType::kF32);
  const int64_t hidden = rows * plan.config.hidden_size * ElementSize(activation);
  if (train.checkpointing) bytes += plan.config.layers * hidden;
  if (stage.HasPhase(QM_PHASE_BLOCK)) {
    bytes += 2 * train.block_tokens * plan.config.hidden_size * ElementSize(activation);
  }
  return bytes + kLogitCopies * 4 * std::min(kLogits, rows * plan.config.vocab_size);
}

int64_t AdapterBytes(const PreparedStage& stage, size_t index) {
  const ReparamPlan* plan = stage.AnyPlan(index);
  int64_t bytes = 0;
  if (plan == nullptr) return bytes;
  for (const ReparamPlan::Param& param : plan->params) bytes += 4 * param.shape.elements();
  return bytes;
}

absl::Status CheckAdapters(const std::string& target, const PreparedStage& stage) {
  if (!stage.trains) return absl::OkStatus();
  const std::string name = absl::StrCat("stage '", stage.stage->name, "'");
  const ResolvedOptions* options = nullptr;
  for (size_t i = 0; i < stage.stage->slots.size(); ++i) {
    const ReparamPlan* plan = stage.AnyPlan(i);
    if (plan == nullptr) continue;
    if (plan->kind == QM_REPARAM_WEIGHT || plan->fold) {
      if (target != kPeftTarget) continue;
      return absl::FailedPreconditionError(
          ErrorText(absl::StrCat(name, " cannot be written as peft"),
                    "it changes weights and leaves no adapter", "use another export format"));
    }
    if (target == "dense") {
      return absl::FailedPreconditionError(
          ErrorText(absl::StrCat("a dense file cannot hold the adapters of ", name), "",
                    "merge them into the weights (merge: true), or export as peft"));
    }
    if (options == nullptr) options = &stage.OptionsOf(i);
    if (*options == stage.OptionsOf(i)) continue;
    return absl::FailedPreconditionError(ErrorText(
        absl::StrCat("the adapter of ", name, " cannot be written"),
        "its options differ from layer to layer, which the files of an adapter cannot say",
        "give all layers of the stage the same options"));
  }
  return absl::OkStatus();
}

bool HasNothingToLearn(const PreparedStage& stage, const StageSet& stages) {
  if (!stage.trains || !stage.stage->train->distill) return false;
  if (&stage != &stages.stages.front()) return false;
  for (size_t i = 0; i < stage.stage->slots.size(); ++i) {
    const ReparamPlan* plan = stage.AnyPlan(i);
    if (plan != nullptr && plan->kind == QM_REPARAM_WEIGHT) return false;
  }
  return true;
}

}  // namespace quantmill
