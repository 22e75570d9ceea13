#include "core/model/weights.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/formats/activations.h"

namespace quantmill {
namespace {

absl::Status ApplyPacked(Backend& backend, const LinearWeight& weight, const Tensor& x,
                         Tensor* out) {
  absl::Status product = weight.kernel->MatMul(*weight.packed, x, out);
  if (product.ok()) {
    return weight.bias.empty() ? absl::OkStatus() : backend.AddBias(weight.bias, out);
  }
  if (!absl::IsUnimplemented(product)) return product;
  if (ActivationsOf(weight.packed->format_json) != Activations::kFloat) {
    return absl::FailedPreconditionError(
        ErrorText(absl::StrCat("products with ", weight.packed->format_id, " ",
                               weight.packed->format_json, " are not served: ", product.message()),
                  "they quantize their input, which the product with the dense weight does not",
                  "install the plugin of that format, or quantize without activations"));
  }
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

namespace {

absl::Status ApplyWeight(Backend& backend, const LinearWeight& weight, const Tensor& x,
                         Tensor* out) {
  const bool packed = weight.packed != nullptr && weight.kernel != nullptr;
  const bool only_packed =
      packed && ActivationsOf(weight.packed->format_json) != Activations::kFloat;
  if (!weight.dense.empty() && !only_packed) {
    return backend.Linear(x, weight.dense, weight.bias, out);
  }
  if (packed) return ApplyPacked(backend, weight, x, out);
  return absl::FailedPreconditionError(ErrorText(
      "a linear has neither a dense weight nor a packed one with a kernel",
      "its tensors were not loaded", "check that the checkpoint has every tensor of the model"));
}

}  // namespace

absl::Status ApplyLinear(Backend& backend, const LinearWeight& weight, const Tensor& x, Tensor* out,
                         LinearTape* tape) {
  Tensor input = x;
  std::vector<Tensor> deltas;
  for (auto adapter = weight.adapters.rbegin(); adapter != weight.adapters.rend(); ++adapter) {
    const bool delta = (*adapter)->kind() == LinearAdapter::Kind::kDelta;
    QM_ASSIGN_OR_RETURN(Tensor result,
                        backend.Allocate(x.dtype(), delta ? out->shape() : x.shape()));
    Tensor saved;
    QM_RETURN_IF_ERROR((*adapter)->Forward(input, tape == nullptr ? nullptr : &saved, &result));
    if (tape != nullptr) tape->steps.push_back({input, std::move(saved)});
    (delta ? deltas.emplace_back() : input) = std::move(result);
  }
  if (tape != nullptr) tape->weight_in = input;
  QM_RETURN_IF_ERROR(ApplyWeight(backend, weight, input, out));
  for (const Tensor& delta : deltas) QM_RETURN_IF_ERROR(backend.Add(delta, out));
  return absl::OkStatus();
}

}  // namespace quantmill
