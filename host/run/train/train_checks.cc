#include "host/run/train/train_checks.h"

#include <algorithm>
#include <map>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/checkpoint/peft_adapter.h"
#include "core/eval/self_text.h"
#include "core/train/adamw.h"
#include "core/train/block_gradients.h"
#include "host/run/train/training.h"

namespace quantmill {

namespace {

int64_t WeightsOf(const LinearSlot& slot) { return slot.out_features * slot.in_features; }

// What a backward pass through a block holds beside the tape: gradients in f32 of two inner
// activations of the MLP, of four hidden states, and a rounded copy.
int64_t BackwardBytes(const ModelConfig& config, int64_t rows) {
  return rows * (2 * config.intermediate_size + 4 * config.hidden_size) * 4 +
         rows * config.intermediate_size * 2;
}

// What a stage trains, and what its adapters hold beside a tape.
struct Trained {
  int64_t weights = 0, largest_block = 0;  // weights in all, and in the block with most of them
  int64_t parameters = 0;
  // Bytes kept between forward and backward pass: what the method saves, and the inputs that reach
  // a weight through an adapter. In all, and in the block with most of them.
  int64_t kept = 0, kept_in_block = 0;
  int64_t gradient = 0;  // bytes of the largest gradients on the way through an adapter
};

Trained CountTrained(const PipelinePlan& plan, const PreparedStage& stage, int64_t rows,
                     int64_t width) {
  Trained trained;
  std::map<int64_t, int64_t> blocks, kept;
  for (size_t i = 0; i < stage.stage->slots.size(); ++i) {
    const ReparamPlan* slot_plan = stage.AnyPlan(i);
    if (slot_plan == nullptr) continue;
    const size_t index = static_cast<size_t>(stage.stage->slots[i]);
    trained.parameters += AdapterBytes(stage, i) / 4;
    const LinearSlot& slot = plan.slots[index];
    const bool of_input = slot_plan->kind == QM_REPARAM_INPUT;
    const int64_t bytes = static_cast<int64_t>(slot_plan->SavedBytes(rows)) +
                          (of_input ? rows * slot.in_features * width : 0);
    trained.kept += bytes;
    trained.kept_in_block = std::max(trained.kept_in_block, kept[slot.block] += bytes);
    if (slot_plan->kind != QM_REPARAM_WEIGHT) {
      // Of the input and, where it is turned, of what it is turned to.
      trained.gradient =
          std::max(trained.gradient, rows * slot.in_features * 4 * (of_input ? 2 : 1));
      continue;
    }
    trained.weights += WeightsOf(slot);
    trained.largest_block = std::max(trained.largest_block, blocks[slot.block] += WeightsOf(slot));
  }
  return trained;
}

}  // namespace

int64_t TrainingBytes(const PipelinePlan& plan, const PreparedStage& stage, DrawingDevice device,
                      int64_t model_bytes) {
  // Bytes of the optimizer per value: master, two moments, gradient; all f32. Means come on top.
  constexpr int64_t kOptimizer = 16, kLogitCopies = 4, kLogits = int64_t{1} << 24;
  const ModelConfig& config = plan.config;
  const TrainOptions& train = *stage.stage->train;
  const DType activation = device.activation;
  const int64_t width = ElementSize(activation);
  const int64_t rows = train.MicroBatch() * train.sequence_length;
  const Trained trained = CountTrained(plan, stage, rows, width);
  // Trained weights stand in the place of the stored ones, as values, as computed with, and the
  // gradient of that.
  const bool teacher = train.distill || stage.HasPhase(QM_PHASE_BLOCK);
  const int64_t fixed = model_bytes * (teacher ? 2 : 1) +
                        trained.weights * (8 + width - ElementSize(config.dtype)) +
                        trained.parameters * 4;
  int64_t blocks = 0, whole = 0;
  if (stage.HasPhase(QM_PHASE_BLOCK)) {
    const int64_t step = train.block_batch * train.sequence_length;
    blocks = trained.largest_block * kOptimizer +
             2 * train.block_tokens * config.hidden_size * width +
             TapeBytes(config, step, activation) + BackwardBytes(config, step);
  }
  if (stage.HasPhase(QM_PHASE_END_TO_END)) {
    int64_t values = trained.weights + trained.parameters;
    if (TrainsEnds(stage)) {
      values += config.vocab_size * config.hidden_size * (config.tied_embeddings ? 1 : 2);
    }
    const int64_t kept = train.checkpointing
                             ? config.layers * rows * config.hidden_size * width
                             : (config.layers - 1) * TapeBytes(config, rows, activation);
    const int64_t logits = kLogitCopies * 4 * std::min(kLogits, rows * config.vocab_size);
    const int64_t block = TapeBytes(config, rows, activation) + BackwardBytes(config, rows) +
                          (train.checkpointing ? trained.kept_in_block : trained.kept) +
                          trained.gradient;
    AdamWOptions optimizer;
    optimizer.average_steps = train.AverageSteps();
    const int64_t average = optimizer.averages() ? 4 : 0;
    whole = values * (kOptimizer + average) + kept + std::max(logits, block);
  }
  // Before, the original alone may draw text.
  int64_t drawing = 0;
  if (train.sampled_tokens > 0) {
    drawing =
        model_bytes + DrawingBytes(config, train.SampledWindows(), train.sequence_length, device);
  }
  return std::max(drawing, fixed + std::max(blocks, whole));
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
