#include "core/train/adamw.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/train/schedule.h"

namespace quantmill {

absl::Status AdamW::Add(const std::string& name, const Tensor& stored, double rate, bool decays) {
  Backend& backend = ops_.backend();
  if (!IsModelFloat(stored.dtype()) || stored.read_only() ||
      !(stored.device() == backend.device())) {
    return absl::InvalidArgumentError(
        absl::StrCat("parameter ", name, " is no writable float tensor on the device"));
  }
  Parameter parameter = {stored, {}, {}, {}, {}, rate, decays};
  NamedTensor gradient = {name, {}};
  for (Tensor* tensor : {&parameter.master, &parameter.first, &parameter.second, &parameter.average,
                         &gradient.tensor}) {
    if (tensor == &parameter.average && !options_.averages()) continue;
    QM_ASSIGN_OR_RETURN(*tensor, backend.Allocate(DType::kF32, stored.shape()));
    QM_RETURN_IF_ERROR(backend.Zero(tensor));
  }
  QM_RETURN_IF_ERROR(backend.Copy(stored, &parameter.master));
  parameters_.push_back(std::move(parameter));
  gradients_.push_back(std::move(gradient));
  return absl::OkStatus();
}

absl::StatusOr<OptimizerStep> AdamW::Step(double learning_rate, int64_t batches) {
  if (batches < 1) return absl::InvalidArgumentError("a step needs at least one batch");
  std::vector<Tensor> tensors;
  for (const NamedTensor& gradient : gradients_) tensors.push_back(gradient.tensor);
  QM_ASSIGN_OR_RETURN(const double squares, ops_.SumOfSquares(tensors));
  OptimizerStep result;
  result.gradient_norm = std::sqrt(squares) / static_cast<double>(batches);
  result.skipped = !std::isfinite(result.gradient_norm);
  if (result.skipped) {
    for (Tensor& gradient : tensors) QM_RETURN_IF_ERROR(ops_.backend().Zero(&gradient));
    return result;
  }
  ++steps_;
  const double factor = ClipFactor(result.gradient_norm, options_.clip_norm);
  const double average_keep = options_.averages() ? 1 - std::max(1 / static_cast<double>(steps_),
                                                                 1 / options_.average_steps)
                                                  : 0;
  std::vector<AdamWUpdate> updates;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const Parameter& p = parameters_[i];
    AdamWStep step;
    step.rate = learning_rate * p.rate;
    step.decay = p.decays ? options_.decay : 0;
    step.beta1 = options_.beta1;
    step.beta2 = options_.beta2;
    step.epsilon = options_.epsilon;
    step.step = steps_;
    step.average_keep = average_keep;
    step.gradient_scale = static_cast<float>(factor / static_cast<double>(batches));
    updates.push_back({step, tensors[i], p.master, p.first, p.second, p.stored, p.average});
  }
  QM_RETURN_IF_ERROR(ops_.AdamW(updates));
  return result;
}

std::vector<NamedTensor> AdamW::State() const {
  std::vector<NamedTensor> state;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const std::string& name = gradients_[i].name;
    state.push_back({name + "/master", parameters_[i].master});
    state.push_back({name + "/first", parameters_[i].first});
    state.push_back({name + "/second", parameters_[i].second});
    if (options_.averages()) state.push_back({name + "/average", parameters_[i].average});
  }
  return state;
}

absl::Status AdamW::StoreAverages() {
  if (!options_.averages() || steps_ == 0) return absl::OkStatus();
  for (Parameter& p : parameters_) {
    QM_RETURN_IF_ERROR(ops_.backend().Copy(p.average, &p.stored));
  }
  return absl::OkStatus();
}

absl::Status AdamW::Restore(int64_t steps) {
  steps_ = steps;
  for (Parameter& p : parameters_) {
    QM_RETURN_IF_ERROR(ops_.backend().Copy(p.master, &p.stored));
  }
  return absl::OkStatus();
}

}  // namespace quantmill
