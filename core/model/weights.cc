#include "core/model/weights.h"

#include "core/base/status.h"

namespace quantmill {
namespace {

LinearWeight* FindByRole(BlockWeights& weights, const LinearSlot& slot) {
  if (slot.role == "attn.q") return &weights.q;
  if (slot.role == "attn.k") return &weights.k;
  if (slot.role == "attn.v") return &weights.v;
  if (slot.role == "attn.o") return &weights.o;
  if (slot.role == "mlp.gate") return &weights.gate;
  if (slot.role == "mlp.up") return &weights.up;
  if (slot.role == "mlp.down") return &weights.down;
  // Groups of expert e are 2 + 2e and 3 + 2e.
  const size_t expert = static_cast<size_t>((slot.input_group - 2) / 2);
  if (expert >= weights.moe.experts.size()) return nullptr;
  if (slot.role == "expert.gate") return &weights.moe.experts[expert].gate;
  if (slot.role == "expert.up") return &weights.moe.experts[expert].up;
  if (slot.role == "expert.down") return &weights.moe.experts[expert].down;
  return nullptr;
}

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

LinearWeight* BlockWeights::Find(const ModelConfig& config, int64_t block, std::string_view slot) {
  for (const LinearSlot& candidate : BlockSlots(config, block)) {
    if (candidate.name == slot) return FindByRole(*this, candidate);
  }
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
