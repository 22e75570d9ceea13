// The model a run has in memory: the original with its edits applied and the units' packed weights
// in place, dequantized by their formats' rules.
#ifndef QUANTMILL_HOST_RUN_UNIT_SOURCE_H_
#define QUANTMILL_HOST_RUN_UNIT_SOURCE_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/formats/packed.h"
#include "core/model/block_edits.h"
#include "core/model/dense_source.h"
#include "core/model/weights.h"

namespace quantmill {

// The packed weight of a slot, on the host; null if it stays dense.
using PackedLookup =
    std::function<absl::StatusOr<std::shared_ptr<const PackedWeight>>(const std::string& slot)>;

// Fills a tensor [out, in] of `dtype` on the backend from a packed weight on the host.
absl::StatusOr<Tensor> DequantizeOn(Backend& backend, FormatRegistry& formats,
                                    const PackedWeight& packed, DType dtype);

// Puts a packed weight on the host in a linear's place: its dense values, and where its products
// quantize their input also the weight itself with a kernel, which is then what is used.
absl::Status PutPacked(Backend& backend, FormatRegistry& formats, const PackedWeight& packed,
                       LinearWeight* weight);

// The edits of a decoder layer's dense tensors, in order; of the number of layers: those of tensors
// outside of the blocks, which are replaced.
using EditLookup = std::function<absl::StatusOr<std::vector<BlockEdit>>(int64_t block)>;

class UnitSource : public WeightSource {
 public:
  // All must outlive this object.
  UnitSource(DenseSource& original, PackedLookup packed, EditLookup edits, FormatRegistry& formats)
      : original_(original),
        packed_(std::move(packed)),
        edits_(std::move(edits)),
        formats_(formats) {}

  const ModelConfig& config() const override { return original_.config(); }
  absl::StatusOr<BlockWeights> LoadBlock(int64_t block, Backend& backend) override;
  absl::StatusOr<Tensor> Embedding() override;
  absl::StatusOr<Tensor> FinalNorm(Backend& backend) override;
  absl::StatusOr<LinearWeight> Head(Backend& backend) override;
  void ReleaseBlock(int64_t block) override { original_.ReleaseBlock(block); }

 private:
  // The new content of a tensor outside of the blocks, F32 on the host; empty: as it was.
  absl::StatusOr<Tensor> Outside(const std::string& name);
  absl::Status Replace(const std::string& slot, Backend& backend, LinearWeight* weight);

  DenseSource& original_;
  PackedLookup packed_;
  EditLookup edits_;
  FormatRegistry& formats_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_UNIT_SOURCE_H_
