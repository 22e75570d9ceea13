#include "host/run/tune_work.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/clock.h"
#include "core/base/status.h"
#include "core/formats/distortion.h"
#include "host/run/fingerprint.h"
#include "host/run/transform_work.h"
#include "host/run/unit_source.h"

namespace quantmill {
namespace {

// Windows on which a block is compared before and after: enough to tell better from worse.
constexpr int64_t kComparedWindows = 8;

// What the stage's own method packed; a fallback's slots are of another format.
const PackedWeight* PackedByStage(const TuneWork& work, const std::string& slot) {
  const auto& records = work.packed->slots;
  const auto record = std::find_if(records.begin(), records.end(),
                                   [&](const SlotRecord& r) { return r.slot == slot; });
  if (record == records.end() || record->method != work.stage->method.loaded.method->id) {
    return nullptr;
  }
  const auto found = work.packed->packed.find(slot);
  return found == work.packed->packed.end() ? nullptr : found->second.get();
}

}  // namespace

absl::Status TuneWorker::RefuseCrashed(const TuneWork& work) const {
  const std::string& block = BlockOf(work).name;
  const auto same = [&](const CrashRecord& crash) {
    return crash.key == work.keys.attempt && crash.Covers(block);
  };
  const auto& crashes = in_.journal->crashes;
  if (std::count_if(crashes.begin(), crashes.end(), same) < kCallAttempts) return absl::OkStatus();
  return absl::AbortedError(absl::StrCat(std::find_if(crashes.begin(), crashes.end(), same)->how,
                                         ", twice; not tried again"));
}

absl::StatusOr<TuneTask> TuneWorker::MakeTask(const TuneWork& work, BlockTrials* trials) {
  const PreparedStage::Part& part = work.stage->parts.at(work.state->index());
  TuneTask task;
  task.block = &part.block;
  task.plan = &part.tuning;
  task.options = &work.stage->OptionsOf(work.slots[0]);
  task.seed = SlotSeed(in_.plan->pipeline.seed, work.stage->stage->name, part.block.name);
  task.trials = trials;
  const auto in_f32 = [this](const Tensor& tensor) -> absl::StatusOr<Tensor> {
    QM_ASSIGN_OR_RETURN(Tensor copy, in_.backend->Allocate(DType::kF32, tensor.shape()));
    QM_RETURN_IF_ERROR(in_.backend->Copy(tensor, &copy));
    return copy;
  };
  std::set<std::string> weights;
  for (const LinearSlot& slot : BlockSlots(in_.plan->config, part.block.block)) {
    weights.insert(slot.name + ".weight");
  }
  const BlockTensors tensors(in_.plan->config, part.block.block, &work.state->dense());
  for (const auto& [name, tensor] : tensors.all()) {
    if (weights.contains(name)) continue;
    QM_ASSIGN_OR_RETURN(Tensor other, in_f32(*tensor));
    task.others.push_back({name, std::move(other)});
  }
  for (const LinearSlot& slot : part.block.slots) {
    QM_ASSIGN_OR_RETURN(Tensor weight, in_f32(work.state->dense().At(slot)->dense));
    task.weights.push_back(std::move(weight));
    PackedWeight& packed = task.packed.emplace_back();
    if (const PackedWeight* made = PackedByStage(work, slot.name); made != nullptr) packed = *made;
    for (NamedTensor& named : packed.tensors) {
      QM_ASSIGN_OR_RETURN(named.tensor, in_.backend->ToDevice(named.tensor));
    }
  }
  return task;
}

absl::Status TuneWorker::Check(const TuneWork& work, const TuneTask& task,
                               const TuneOutcome& outcome, std::set<std::string>* changed) const {
  for (size_t i = 0; i < outcome.tuned.size(); ++i) {
    if (!outcome.tuned[i]) continue;
    QM_RETURN_IF_ERROR(
        WithContext(in_.formats->Check(*outcome.tuned[i]), task.block->slots[i].name));
  }
  const BlockEditor& editor = *work.state->editor();
  const std::vector<LinearSlot> slots = BlockSlots(in_.plan->config, work.state->index());
  BlockWeights trial = work.state->dense();
  for (const BlockEdit& edit : outcome.edits) {
    const bool weight = std::any_of(slots.begin(), slots.end(), [&](const LinearSlot& slot) {
      return edit.target == slot.name + ".weight";
    });
    if (edit.kind != EditKind::kReplace || weight) {
      return absl::InvalidArgumentError(absl::StrCat("edit '", std::string(EditName(edit.kind)),
                                                     "' of ", edit.target,
                                                     ": tuning may replace norms and biases only"));
    }
    QM_RETURN_IF_ERROR(editor.Check(edit));
    QM_RETURN_IF_ERROR(editor.Apply(edit, &trial, changed).status());
  }
  return absl::OkStatus();
}

absl::StatusOr<double> TuneWorker::Loss(const TuneTask& task,
                                        const std::vector<const PackedWeight*>& packed,
                                        const std::vector<BlockEdit>& edits) {
  std::vector<TensorOverride> overrides;
  for (size_t i = 0; i < packed.size(); ++i) {
    if (packed[i]->format_id.empty()) continue;
    TensorOverride& item = overrides.emplace_back();
    item.name = task.block->slots[i].name + ".weight";
    QM_ASSIGN_OR_RETURN(item.value, DequantizeOn(*in_.backend, *in_.formats, *packed[i],
                                                 in_.backend->activation_dtype()));
  }
  for (const BlockEdit& edit : edits) overrides.push_back({edit.target, edit.value});
  return task.trials->Loss("", 0, std::min(kComparedWindows, task.trials->windows()), overrides);
}

absl::StatusOr<double> TuneWorker::WeightError(const Tensor& weight, const PackedWeight& packed) {
  QM_ASSIGN_OR_RETURN(const Tensor dequantized,
                      DequantizeOn(*in_.backend, *in_.formats, packed, DType::kF32));
  QM_ASSIGN_OR_RETURN(Tensor reference, Tensor::Host(DType::kF32, weight.shape()));
  QM_ASSIGN_OR_RETURN(Tensor approximate, Tensor::Host(DType::kF32, weight.shape()));
  QM_RETURN_IF_ERROR(in_.backend->Copy(weight, &reference));
  QM_RETURN_IF_ERROR(in_.backend->Copy(dequantized, &approximate));
  QM_ASSIGN_OR_RETURN(const Distortion distortion, MeasureDistortion(reference, approximate));
  if (distortion.finite) return distortion.nmse();
  return absl::InternalError("a tuned weight dequantizes to values that are not finite");
}

absl::StatusOr<TuneWorker::Comparison> TuneWorker::Compare(const TuneTask& task,
                                                           const TuneOutcome& outcome) {
  std::vector<const PackedWeight*> before, after;
  Comparison comparison;
  for (size_t i = 0; i < task.packed.size(); ++i) {
    before.push_back(&task.packed[i]);
    after.push_back(outcome.tuned[i] ? &*outcome.tuned[i] : &task.packed[i]);
    double& error = comparison.weight_nmse.emplace_back(0);
    if (!outcome.tuned[i]) continue;
    QM_ASSIGN_OR_RETURN(error, WeightError(task.weights[i], *outcome.tuned[i]));
  }
  QM_ASSIGN_OR_RETURN(comparison.loss_before, Loss(task, before, {}));
  QM_ASSIGN_OR_RETURN(comparison.loss_after, Loss(task, after, outcome.edits));
  return comparison;
}

absl::Status TuneWorker::Attempt(const TuneWork& work, TuneOutcome* outcome, Comparison* comparison,
                                 TuneResult* result) {
  const PreparedStage::Part& part = work.stage->parts.at(work.state->index());
  QM_RETURN_IF_ERROR(RefuseCrashed(work));
  BlockTrials trials(
      *in_.backend, in_.plan->config, part.block.block, work.state->dense(),
      work.calibration->windows(),
      [&work](int64_t window) { return work.calibration->Input(window, false); }, kTrialCacheBytes);
  QM_ASSIGN_OR_RETURN(const TuneTask task, MakeTask(work, &trials));
  *outcome =
      runner_.Run(work.stage->method.loaded, work.stage->stage->name, work.keys.attempt, task);
  QM_RETURN_IF_ERROR(outcome->status);
  const std::string context =
      absl::StrCat("stage ", work.stage->stage->name, ", plugin ",
                   work.stage->method.loaded.method->id, ", ", part.block.name);
  QM_RETURN_IF_ERROR(WithContext(Check(work, task, *outcome, &result->changed), context));
  QM_ASSIGN_OR_RETURN(*comparison, Compare(task, *outcome));
  return absl::OkStatus();
}

void TuneWorker::AddRecords(const TuneWork& work, const TuneOutcome& outcome,
                            const Comparison& comparison, double seconds, const std::string& error,
                            TuneResult* result) const {
  const std::vector<LinearSlot>& slots = BlockOf(work).slots;
  for (size_t i = 0; i < slots.size(); ++i) {
    const auto& made = work.packed->slots;
    const auto packed = std::find_if(made.begin(), made.end(),
                                     [&](const SlotRecord& r) { return r.slot == slots[i].name; });
    if (packed == made.end() || PackedByStage(work, slots[i].name) == nullptr) continue;
    SlotRecord r = *packed;
    r.tuned = true;
    r.packed = result->packed.contains(r.slot);
    r.error = error;
    r.seed = SlotSeed(in_.plan->pipeline.seed, work.stage->stage->name, BlockOf(work).name);
    if (r.packed) r.weight_nmse = comparison.weight_nmse[i];
    r.output_nmse = -1;
    r.loss_before = comparison.loss_before;
    r.loss_after = comparison.loss_after;
    r.seconds = seconds / static_cast<double>(slots.size());
    r.scratch_peak_bytes = static_cast<int64_t>(outcome.scratch_peak);
    result->records.push_back(std::move(r));
  }
}

absl::StatusOr<TuneResult> TuneWorker::Run(const TuneWork& work) {
  const auto start = Clock::now();
  const PlannedStage& stage = *work.stage->stage;
  const std::string& block = BlockOf(work).name;
  TuneOutcome outcome;
  Comparison comparison;
  TuneResult result;
  const std::vector<LinearSlot>& slots = BlockOf(work).slots;
  const bool any = std::any_of(slots.begin(), slots.end(), [&](const LinearSlot& slot) {
    return PackedByStage(work, slot.name) != nullptr;
  });
  if (!any) return result;  // on_error left nothing to tune
  const absl::Status failure = Attempt(work, &outcome, &comparison, &result);
  std::string error;
  if (!failure.ok()) {
    if (IsDeviceLost(failure) || absl::IsDataLoss(failure) ||
        stage.on_error.action == OnError::Action::kStop) {
      return failure;
    }
    error = absl::StrCat(failure.message());
  } else if (!(comparison.loss_after <= comparison.loss_before)) {
    error = absl::StrCat("tuning made the block worse: mean squared error ", comparison.loss_after,
                         " after ", comparison.loss_before);
  }
  if (error.empty()) {
    for (size_t i = 0; i < outcome.tuned.size(); ++i) {
      if (!outcome.tuned[i]) continue;
      result.packed[slots[i].name] = std::make_shared<PackedWeight>(*std::move(outcome.tuned[i]));
    }
    result.edits = std::move(outcome.edits);
  } else {
    in_.sink({{"type", "log"},
              {"severity", 2},
              {"text", absl::StrCat(error, "; ", block, " stays as it was packed")}});
    result.changed.clear();
  }
  AddRecords(work, outcome, comparison, SecondsSince(start), error, &result);
  return result;
}

}  // namespace quantmill
