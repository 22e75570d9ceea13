#include "core/model/window_states.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"

namespace quantmill {
namespace {

absl::Status CheckWindows(const Tensor& windows, const Tensor& embedding) {
  if (windows.rank() != 2 || windows.dtype() != DType::kI32 || !windows.device().is_cpu() ||
      windows.elements() == 0) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrCat("token windows ", windows.shape().ToString(), " are not usable"),
                  "they must be 32-bit ids [windows, length] on the host, with at least one window",
                  "use a longer text or shorter windows"));
  }
  const int32_t* ids = windows.as<int32_t>();
  for (int64_t i = 0; i < windows.elements(); ++i) {
    if (ids[i] < 0 || ids[i] >= embedding.dim(0)) {
      return absl::InvalidArgumentError(
          ErrorText(absl::StrCat("token id ", ids[i], " is out of range"),
                    absl::StrCat("the model has ", embedding.dim(0), " embeddings"),
                    "check that the tokenizer belongs to this model"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Tensor> AllocateStates(Backend& backend, const Shape& shape, bool on_device) {
  return on_device ? backend.Allocate(backend.activation_dtype(), shape)
                   : Tensor::Host(backend.activation_dtype(), shape);
}

}  // namespace

absl::StatusOr<WindowStates> WindowStates::Embed(Backend& backend, const Tensor& windows,
                                                 const Tensor& embedding, int64_t batch_rows,
                                                 bool on_device) {
  QM_RETURN_IF_ERROR(CheckWindows(windows, embedding));
  WindowStates result;
  result.windows_ = windows.dim(0);
  result.length_ = windows.dim(1);
  result.batch_windows_ = std::max<int64_t>(1, batch_rows / result.length_);
  result.on_device_ = on_device;
  QM_ASSIGN_OR_RETURN(result.states_,
                      AllocateStates(backend, {windows.elements(), embedding.dim(1)}, on_device));
  const Tensor ids = windows.Reshaped({windows.elements()});
  for (int64_t batch = 0; batch < result.batches(); ++batch) {
    const WindowRange range = result.Batch(batch);
    const int64_t begin = range.begin * result.length_, end = range.end * result.length_;
    QM_ASSIGN_OR_RETURN(Tensor hidden, backend.Allocate(backend.activation_dtype(),
                                                        {end - begin, embedding.dim(1)}));
    QM_RETURN_IF_ERROR(backend.Embed(embedding, ids.Rows(begin, end), &hidden));
    QM_RETURN_IF_ERROR(result.Store(backend, range, hidden));
  }
  return result;
}

absl::StatusOr<WindowStates> WindowStates::Clone(Backend& backend) const {
  WindowStates result = *this;
  QM_ASSIGN_OR_RETURN(result.states_, AllocateStates(backend, states_.shape(), on_device_));
  QM_RETURN_IF_ERROR(backend.Copy(states_, &result.states_));
  return result;
}

int64_t WindowStates::batches() const { return (windows_ + batch_windows_ - 1) / batch_windows_; }

WindowRange WindowStates::Batch(int64_t index) const {
  return {index * batch_windows_, std::min(windows_, (index + 1) * batch_windows_)};
}

absl::StatusOr<Tensor> WindowStates::Load(Backend& backend, WindowRange range) const {
  const Tensor source = states_.Rows(range.begin * length_, range.end * length_);
  QM_ASSIGN_OR_RETURN(Tensor hidden, backend.Allocate(states_.dtype(), source.shape()));
  QM_RETURN_IF_ERROR(backend.Copy(source, &hidden));
  return hidden;
}

absl::Status WindowStates::Store(Backend& backend, WindowRange range, const Tensor& hidden) {
  Tensor target = states_.Rows(range.begin * length_, range.end * length_);
  return backend.Copy(hidden, &target);
}

absl::Status WindowStates::Advance(Backend& backend, const ModelConfig& config,
                                   const BlockWeights& weights, int64_t block,
                                   const RopeTables& rope, int64_t batch) {
  const WindowRange range = Batch(batch);
  QM_ASSIGN_OR_RETURN(Tensor hidden, Load(backend, range));
  BlockRun run;
  run.batch = range.count();
  QM_RETURN_IF_ERROR(RunBlock(backend, config, weights, block, rope, run, &hidden));
  return Store(backend, range, hidden);
}

}  // namespace quantmill
