#include "core/eval/logits.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"

namespace quantmill {

absl::StatusOr<Tensor> ComputeLogits(Backend& backend, WeightSource& model, const Tensor& ids,
                                     const StepProgress& progress) {
  if (ids.rank() != 2 || ids.dim(0) != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("token ids are ", ids.shape().ToString(),
                     "; one sequence is expected; give a tensor of shape [1, T]"));
  }
  QM_ASSIGN_OR_RETURN(const WindowStates states,
                      RunWindows(backend, model, ids, StreamOptions{}, progress));
  QM_ASSIGN_OR_RETURN(const Tensor hidden, states.Load(backend, {0, 1}));
  QM_ASSIGN_OR_RETURN(const OutputHead head, OutputHead::Load(backend, model));
  const int64_t rows = ids.dim(1);
  QM_ASSIGN_OR_RETURN(Tensor logits, Tensor::Host(DType::kF32, {rows, model.config().vocab_size}));
  for (int64_t begin = 0; begin < rows; begin += head.TileRows()) {
    const int64_t end = std::min(rows, begin + head.TileRows());
    QM_ASSIGN_OR_RETURN(const Tensor tile, head.Logits(backend, hidden.Rows(begin, end)));
    Tensor target = logits.Rows(begin, end);
    QM_RETURN_IF_ERROR(backend.Copy(tile, &target));
  }
  return logits;
}

}  // namespace quantmill
