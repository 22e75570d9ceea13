#include "host/run/train/plugin_adapter.h"

#include "core/base/status.h"

namespace quantmill {

absl::Status PluginAdapter::Forward(const Tensor& x, Tensor* saved, Tensor* out) {
  if (x.dim(0) == 0) return absl::OkStatus();
  if (saved != nullptr) {
    const int64_t bytes = static_cast<int64_t>(plan_.SavedBytes(x.dim(0)));
    if (bytes > 0) {
      QM_ASSIGN_OR_RETURN(*saved, calls_.backend().Allocate(DType::kU8, {bytes}));
    }
  }
  return calls_.Forward(subject_, x, params_, saved, out);
}

absl::Status PluginAdapter::Backward(const Tensor& x, const Tensor& saved, const Tensor& d_out,
                                     Tensor* d_x) {
  std::vector<NamedTensor> gradients = gradients_;
  // One that is not trained passes gradients on all the same.
  for (size_t i = gradients.size(); i < params_.size(); ++i) {
    gradients.push_back({params_[i].name, {}});
  }
  return calls_.Vjp(subject_, x, params_, saved, d_out, d_x, gradients);
}

}  // namespace quantmill
