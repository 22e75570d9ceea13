// An adapter around a linear that a plugin computes (QM_REPARAM_INPUT or QM_REPARAM_DELTA).
#ifndef QUANTMILL_HOST_RUN_TRAIN_PLUGIN_ADAPTER_H_
#define QUANTMILL_HOST_RUN_TRAIN_PLUGIN_ADAPTER_H_

#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "core/formats/packed.h"
#include "core/model/weights.h"
#include "host/run/train/reparam_calls.h"

namespace quantmill {

class PluginAdapter : public LinearAdapter {
 public:
  // params: F32 on the device, in the plan's order. `calls` and what the subject names must outlive
  // this object.
  PluginAdapter(ReparamCalls& calls, ReparamSubject subject, ReparamPlan plan,
                std::vector<NamedTensor> params)
      : calls_(calls),
        subject_(std::move(subject)),
        plan_(std::move(plan)),
        params_(std::move(params)) {}

  Kind kind() const override {
    return plan_.kind == QM_REPARAM_INPUT ? Kind::kInput : Kind::kDelta;
  }
  absl::Status Forward(const Tensor& x, Tensor* saved, Tensor* out) override;
  absl::Status Backward(const Tensor& x, const Tensor& saved, const Tensor& d_out,
                        Tensor* d_x) override;

  // Where Backward adds gradients: one per parameter, F32; empty where none is wanted.
  void SetGradients(std::vector<NamedTensor> gradients) { gradients_ = std::move(gradients); }

 private:
  ReparamCalls& calls_;
  const ReparamSubject subject_;
  const ReparamPlan plan_;
  const std::vector<NamedTensor> params_;
  std::vector<NamedTensor> gradients_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TRAIN_PLUGIN_ADAPTER_H_
