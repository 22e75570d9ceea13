// A block as a plugin sees it, and the edits of it that a plugin hands back.
#ifndef QUANTMILL_HOST_RUN_BLOCK_VIEW_H_
#define QUANTMILL_HOST_RUN_BLOCK_VIEW_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/model/block_edits.h"
#include "core/model/graph.h"
#include "core/model/sites.h"
#include "core/tensor/backend.h"
#include "host/run/call_parts.h"
#include "quantmill/all.h"

namespace quantmill {

// The part of a block that a transforming or tuning stage works on.
struct TransformBlock {
  int64_t block = 0;
  std::string name;  // "model.layers.3"
  std::vector<LinearSlot> slots;
  std::vector<DType> weight_dtypes;              // as stored, per slot
  std::vector<qm_next_rounding> next_roundings;  // per slot; empty: not told
  // Sites whose linears are all among `slots`.
  std::vector<ScaleSite> sites;
  DType scale_dtype = DType::kF16;
};

// qm_block_info over a block, with the memory it points into.
class BlockView {
 public:
  // `block` and `weights` (one per slot, or none) must outlive this object.
  BlockView(const TransformBlock& block, const std::vector<Tensor>& weights);
  BlockView(const BlockView&) = delete;
  BlockView& operator=(const BlockView&) = delete;
  const qm_block_info* get() const { return &info_; }

 private:
  void AddSite(const ScaleSite& site);

  std::vector<std::unique_ptr<LinearInfoView>> linears_;
  std::vector<const qm_linear_info*> pointers_;
  std::vector<qm_tensor> weights_;
  std::vector<std::vector<qm_site_consumer>> consumers_;
  std::vector<qm_scale_site> sites_;
  qm_block_info info_;
};

// Copies of a plugin's edits, their values as F32 on the host; targets are not checked. INTERNAL
// says what is wrong with the list.
absl::StatusOr<std::vector<BlockEdit>> TakeEdits(Backend& backend, const qm_edit* edits,
                                                 uint64_t count);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_BLOCK_VIEW_H_
