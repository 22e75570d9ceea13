#include "host/run/tune_parts.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/formats/distortion.h"
#include "core/model/graph.h"
#include "host/run/unit_source.h"

namespace quantmill {
namespace {

// Windows on which a block is compared before and after: enough to tell better from worse.
constexpr int64_t kComparedWindows = 8;

// Of the block with these packed weights and edits, on the first windows.
absl::StatusOr<double> TuneLoss(Backend& backend, FormatRegistry& formats, const TuneTask& task,
                                const std::vector<const PackedWeight*>& packed,
                                const std::vector<BlockEdit>& edits) {
  std::vector<TensorOverride> overrides;
  for (size_t i = 0; i < packed.size(); ++i) {
    if (packed[i]->format_id.empty()) continue;
    TensorOverride& item = overrides.emplace_back();
    item.name = task.block->slots[i].name + ".weight";
    QM_ASSIGN_OR_RETURN(item.value,
                        DequantizeOn(backend, formats, *packed[i], backend.activation_dtype()));
  }
  for (const BlockEdit& edit : edits) overrides.push_back({edit.target, edit.value});
  return task.trials->Loss("", 0, std::min(kComparedWindows, task.trials->windows()), overrides);
}

absl::StatusOr<double> TunedWeightError(Backend& backend, FormatRegistry& formats,
                                        const Tensor& weight, const PackedWeight& packed) {
  QM_ASSIGN_OR_RETURN(const Tensor dequantized,
                      DequantizeOn(backend, formats, packed, DType::kF32));
  QM_ASSIGN_OR_RETURN(Tensor reference, Tensor::Host(DType::kF32, weight.shape()));
  QM_ASSIGN_OR_RETURN(Tensor approximate, Tensor::Host(DType::kF32, weight.shape()));
  QM_RETURN_IF_ERROR(backend.Copy(weight, &reference));
  QM_RETURN_IF_ERROR(backend.Copy(dequantized, &approximate));
  QM_ASSIGN_OR_RETURN(const Distortion distortion, MeasureDistortion(reference, approximate));
  if (distortion.finite) return distortion.nmse();
  return absl::InternalError("a tuned weight dequantizes to values that are not finite");
}

absl::StatusOr<Tensor> CopyInF32(const Tensor& tensor, Backend& backend) {
  QM_ASSIGN_OR_RETURN(Tensor copy, backend.Allocate(DType::kF32, tensor.shape()));
  QM_RETURN_IF_ERROR(backend.Copy(tensor, &copy));
  return copy;
}

}  // namespace

absl::Status AddDenseParts(const ModelConfig& config, const BlockWeights& dense, Backend& backend,
                           TuneTask* task) {
  const int64_t block = task->block->block;
  std::set<std::string> weights;
  for (const LinearSlot& slot : BlockSlots(config, block)) weights.insert(slot.name + ".weight");
  BlockWeights handles = dense;
  const BlockTensors tensors(config, block, &handles);
  for (const auto& [name, tensor] : tensors.all()) {
    if (weights.contains(name)) continue;
    QM_ASSIGN_OR_RETURN(Tensor other, CopyInF32(*tensor, backend));
    task->others.push_back({name, std::move(other)});
  }
  for (const LinearSlot& slot : task->block->slots) {
    QM_ASSIGN_OR_RETURN(Tensor weight, CopyInF32(handles.At(slot)->dense, backend));
    task->weights.push_back(std::move(weight));
  }
  return absl::OkStatus();
}

absl::Status CheckTuned(const ModelConfig& config, const BlockEditor& editor,
                        const BlockWeights& dense, FormatRegistry& formats, const TuneTask& task,
                        const TuneOutcome& outcome, std::set<std::string>* changed) {
  for (size_t i = 0; i < outcome.tuned.size(); ++i) {
    if (!outcome.tuned[i]) continue;
    QM_RETURN_IF_ERROR(WithContext(formats.Check(*outcome.tuned[i]), task.block->slots[i].name));
  }
  const std::vector<LinearSlot> slots = BlockSlots(config, task.block->block);
  BlockWeights trial = dense;
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

absl::StatusOr<TuneComparison> CompareTuned(Backend& backend, FormatRegistry& formats,
                                            const TuneTask& task, const TuneOutcome& outcome) {
  std::vector<const PackedWeight*> before, after;
  TuneComparison comparison;
  for (size_t i = 0; i < task.packed.size(); ++i) {
    before.push_back(&task.packed[i]);
    after.push_back(outcome.tuned[i] ? &*outcome.tuned[i] : &task.packed[i]);
    double& error = comparison.weight_nmse.emplace_back(0);
    if (!outcome.tuned[i]) continue;
    QM_ASSIGN_OR_RETURN(error,
                        TunedWeightError(backend, formats, task.weights[i], *outcome.tuned[i]));
  }
  QM_ASSIGN_OR_RETURN(comparison.loss_before, TuneLoss(backend, formats, task, before, {}));
  QM_ASSIGN_OR_RETURN(comparison.loss_after,
                      TuneLoss(backend, formats, task, after, outcome.edits));
  return comparison;
}

}  // namespace quantmill
