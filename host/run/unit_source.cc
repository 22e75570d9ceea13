#include "host/run/unit_source.h"

#include <set>
#include <utility>

#include "core/base/status.h"
#include "core/formats/activations.h"
#include "core/model/graph.h"
#include "host/run/block_state.h"

namespace quantmill {

namespace {

constexpr char kEmbeddingTensor[] = "model.embed_tokens.weight";
constexpr char kFinalNormTensor[] = "model.norm.weight";

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

absl::StatusOr<Tensor> UnitSource::Outside(const std::string& name) {
  QM_ASSIGN_OR_RETURN(const std::vector<BlockEdit> edits, edits_(config().layers));
  Tensor found;
  for (const BlockEdit& edit : edits) {
    if (edit.target == name) found = edit.value;
  }
  return found;
}

absl::StatusOr<Tensor> UnitSource::Embedding() {
  // Its values are those of the stored dtype: no rounding is left to do.
  QM_ASSIGN_OR_RETURN(const Tensor table, Outside(kEmbeddingTensor));
  return table.empty() ? original_.Embedding() : table;
}

absl::StatusOr<Tensor> UnitSource::FinalNorm(Backend& backend) {
  QM_ASSIGN_OR_RETURN(const Tensor norm, Outside(kFinalNormTensor));
  if (norm.empty()) return original_.FinalNorm(backend);
  return backend.ToDevice(norm);
}

absl::StatusOr<LinearWeight> UnitSource::Head(Backend& backend) {
  QM_ASSIGN_OR_RETURN(LinearWeight head, original_.Head(backend));
  const std::string slot = HeadSlot(config()).name;
  QM_ASSIGN_OR_RETURN(const Tensor weight,
                      Outside(config().tied_embeddings ? kEmbeddingTensor : slot + ".weight"));
  if (!weight.empty()) {
    QM_ASSIGN_OR_RETURN(
        Tensor dense,
        backend.Allocate(head.dense.empty() ? DType::kF32 : head.dense.dtype(), weight.shape()));
    QM_RETURN_IF_ERROR(backend.Copy(weight, &dense));
    head.dense = std::move(dense);
  }
  QM_RETURN_IF_ERROR(Replace(slot, backend, &head));
  return head;
}

}  // namespace quantmill
