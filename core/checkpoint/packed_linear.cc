#include "core/checkpoint/packed_linear.h"

#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "core/base/status.h"
#include "core/formats/activations.h"
#include "core/formats/reference.h"

namespace quantmill {

absl::StatusOr<LinearWeight> MakePackedLinear(PackedWeight weight, PackedMode mode,
                                              FormatRegistry* registry, Backend& backend) {
  for (NamedTensor& named : weight.tensors) {
    QM_ASSIGN_OR_RETURN(named.tensor, backend.ToDevice(named.tensor));
  }
  std::shared_ptr<PackedKernel> kernel = MakeReferencePackedKernel(backend);
  if (registry != nullptr) {
    QM_ASSIGN_OR_RETURN(kernel, registry->Kernel(weight, backend));
  }
  LinearWeight linear;
  // Dense values say nothing of quantized activations: such a weight stays packed.
  if (mode == PackedMode::kDequantize && ActivationsOf(weight.format_json) == Activations::kFloat) {
    QM_ASSIGN_OR_RETURN(linear.dense, backend.Allocate(backend.activation_dtype(),
                                                       {weight.out_features, weight.in_features}));
    QM_RETURN_IF_ERROR(kernel->Dequantize(weight, &linear.dense));
    return linear;
  }
  absl::StatusOr<PackedWeight> prepacked = kernel->Prepack(weight);
  if (absl::IsUnimplemented(prepacked.status())) prepacked = std::move(weight);
  if (!prepacked.ok()) return prepacked.status();
  linear.packed = std::make_shared<const PackedWeight>(*std::move(prepacked));
  linear.kernel = kernel;
  return linear;
}

}  // namespace quantmill
