#include "host/run/unit_source.h"

#include <set>
#include <utility>

#include "core/base/status.h"
#include "core/formats/activations.h"
#include "core/model/graph.h"
#include "host/run/block_state.h"

namespace quantmill {

namespace {

absl::StatusOr<PackedWeight> OnDevice(Backend& backend, const PackedWeight& packed) {
  PackedWeight on_device = packed;
  for (NamedTensor& named : on_device.tensors) {
    QM_ASSIGN_OR_RETURN(named.tensor, backend.ToDevice(named.tensor));
  }
  return on_device;
}

}  // namespace

absl::Status PutPacked(Backend& backend, FormatRegistry& formats, const PackedWeight& packed,
                       LinearWeight* weight) {
  QM_ASSIGN_OR_RETURN(weight->dense,
                      DequantizeOn(backend, formats, packed, backend.activation_dtype()));
  weight->packed = nullptr;
  weight->kernel = nullptr;
  if (ActivationsOf(packed.format_json) == Activations::kFloat) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(PackedWeight on_device, OnDevice(backend, packed));
  QM_ASSIGN_OR_RETURN(weight->kernel, formats.Kernel(on_device, backend));
  weight->packed = std::make_shared<const PackedWeight>(std::move(on_device));
  return absl::OkStatus();
}

absl::StatusOr<Tensor> DequantizeOn(Backend& backend, FormatRegistry& formats,
                                    const PackedWeight& packed, DType dtype) {
  QM_ASSIGN_OR_RETURN(const PackedWeight on_device, OnDevice(backend, packed));
  QM_ASSIGN_OR_RETURN(const std::shared_ptr<PackedKernel> kernel,
                      formats.Kernel(on_device, backend));
  QM_ASSIGN_OR_RETURN(Tensor out,
                      backend.Allocate(dtype, Shape({packed.out_features, packed.in_features})));
  QM_RETURN_IF_ERROR(kernel->Dequantize(on_device, &out));
  return out;
}

absl::Status UnitSource::Replace(const std::string& slot, Backend& backend, LinearWeight* weight) {
  QM_ASSIGN_OR_RETURN(const std::shared_ptr<const PackedWeight> packed, packed_(slot));
  if (packed == nullptr || weight == nullptr) return absl::OkStatus();
  return PutPacked(backend, formats_, *packed, weight);
}

absl::StatusOr<BlockWeights> UnitSource::LoadBlock(int64_t block, Backend& backend) {
  QM_ASSIGN_OR_RETURN(BlockWeights weights, original_.LoadBlock(block, backend));
  QM_ASSIGN_OR_RETURN(const std::vector<BlockEdit> edits, edits_(block));
  if (!edits.empty()) {
    std::set<std::string> changed;
    QM_RETURN_IF_ERROR(ApplyFinally(config(), block, edits, backend, &weights, &changed));
  }
  for (const LinearSlot& slot : BlockSlots(config(), block)) {
    QM_RETURN_IF_ERROR(Replace(slot.name, backend, weights.At(slot)));
  }
  return weights;
}

absl::StatusOr<LinearWeight> UnitSource::Head(Backend& backend) {
  QM_ASSIGN_OR_RETURN(LinearWeight head, original_.Head(backend));
  QM_RETURN_IF_ERROR(Replace(HeadSlot(config()).name, backend, &head));
  return head;
}

}  // namespace quantmill
