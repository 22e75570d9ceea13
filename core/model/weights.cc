#include "core/model/weights.h"

#include "core/base/status.h"

namespace quantmill {
namespace {

absl::Status ApplyPacked(Backend& backend, const LinearWeight& weight, const Tensor& x,
                         Tensor* out) {
  const absl::Status product = weight.kernel->MatMul(*weight.packed, x, out);
  if (product.ok()) {
    return weight.bias.empty() ? absl::OkStatus() : backend.AddBias(weight.bias, out);
  }
  if (!absl::IsUnimplemented(product)) return product;
  QM_ASSIGN_OR_RETURN(Tensor dense,
                      backend.Allocate(backend.activation_dtype(),
                                       {weight.packed->out_features, weight.packed->in_features}));
  QM_RETURN_IF_ERROR(weight.kernel->Dequantize(*weight.packed, &dense));
  return backend.Linear(x, dense, weight.bias, out);
}

}  // namespace

LinearWeight* BlockWeights::At(const LinearSlot& slot) {
  if (slot.role == "attn.q") return &q;
  if (slot.role == "attn.k") return &k;
  if (slot.role == "attn.v") return &v;
  if (slot.role == "attn.o") return &o;
  if (slot.role == "mlp.gate") return &gate;
  if (slot.role == "mlp.up") return &up;
  if (slot.role == "mlp.down") return &down;
  // Groups of expert e are 2 + 2e and 3 + 2e.
  const size_t expert = static_cast<size_t>((slot.input_group - 2) / 2);
  if (slot.input_group < 2 || expert >= moe.experts.size()) return nullptr;
  if (slot.role == "expert.gate") return &moe.experts[expert].gate;
  if (slot.role == "expert.up") return &moe.experts[expert].up;
  if (slot.role == "expert.down") return &moe.experts[expert].down;
  return nullptr;
}

absl::Status ApplyLinear(Backend& backend, const LinearWeight& weight, const Tensor& x,
                         Tensor* out) {
  if (!weight.dense.empty()) return backend.Linear(x, weight.dense, weight.bias, out);
  if (weight.packed != nullptr && weight.kernel != nullptr) {
    return ApplyPacked(backend, weight, x, out);
  }
  return absl::FailedPreconditionError(ErrorText(
      "a linear has neither a dense weight nor a packed one with a kernel",
      "its tensors were not loaded", "check that the checkpoint has every tensor of the model"));
}

}  // namespace quantmill
