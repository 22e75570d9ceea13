#include "host/run/edit_check.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "host/run/preservation.h"

namespace quantmill {
namespace {

constexpr int64_t kCheckedRows = 128;  // of calibration text,
constexpr int64_t kMadeUpRows = 32;    // or without any

// Uniform in [-1, 1).
absl::StatusOr<Tensor> MadeUpInput(int64_t hidden_size) {
  QM_ASSIGN_OR_RETURN(Tensor input, Tensor::Host(DType::kF32, {kMadeUpRows, hidden_size}));
  uint64_t state = 1;
  for (int64_t i = 0; i < input.elements(); ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX generator
    input.as<float>()[i] = static_cast<float>(static_cast<double>(state >> 11) * 0x1p-52 - 1.0);
  }
  return input;
}

}  // namespace

absl::StatusOr<Tensor> CheckedInput(const Tensor* window, int64_t hidden_size, Backend& backend) {
  if (window == nullptr) {
    QM_ASSIGN_OR_RETURN(const Tensor input, MadeUpInput(hidden_size));
    return backend.ToDevice(input);
  }
  const Tensor rows = window->Rows(0, std::min(kCheckedRows, window->dim(0)));
  QM_ASSIGN_OR_RETURN(Tensor input, backend.Allocate(DType::kF32, rows.shape()));
  QM_RETURN_IF_ERROR(backend.Copy(rows, &input));
  return input;
}

absl::Status CheckEdits(const ModelConfig& config, const TransformBlock& block,
                        const BlockEditor& editor, const BlockWeights& weights,
                        absl::Span<const BlockEdit> edits, const Tensor& input, Backend& backend,
                        std::set<std::string>* changed) {
  const std::vector<LinearSlot> slots = BlockSlots(config, block.block);
  for (const BlockEdit& edit : edits) {
    QM_RETURN_IF_ERROR(editor.Check(edit));
    const bool offered = std::any_of(block.sites.begin(), block.sites.end(),
                                     [&](const ScaleSite& site) { return site.id == edit.target; });
    const std::string module = edit.kind == EditKind::kReplace
                                   ? edit.target.substr(0, edit.target.rfind('.'))
                                   : edit.target;
    const auto named = [&](const LinearSlot& slot) { return slot.name == module; };
    const bool foreign = std::any_of(slots.begin(), slots.end(), named) &&
                         std::none_of(block.slots.begin(), block.slots.end(), named);
    if (edit.preserves() ? !offered : foreign) {
      return absl::InvalidArgumentError(
          absl::StrCat("edit '", std::string(EditName(edit.kind)), "' of ", edit.target,
                       ": it reaches linears that the stage's layers do not name"));
    }
  }
  BlockWeights trial = weights;
  for (const BlockEdit& edit : edits) {
    QM_RETURN_IF_ERROR(editor.Apply(edit, &trial, changed).status());
  }
  return CheckPreserved(config, block.block, editor, weights, edits, input, backend);
}

}  // namespace quantmill
