#include "host/run/train/adapted_source.h"

#include "core/base/status.h"
#include "core/model/graph.h"

namespace quantmill {

absl::StatusOr<BlockWeights> AdaptedSource::LoadBlock(int64_t block, Backend& backend) {
  QM_ASSIGN_OR_RETURN(BlockWeights weights, inner_.LoadBlock(block, backend));
  for (const LinearSlot& slot : BlockSlots(config(), block)) {
    LinearWeight* weight = weights.At(slot);
    if (weight == nullptr) continue;
    QM_ASSIGN_OR_RETURN(const std::vector<std::shared_ptr<LinearAdapter>> adapters,
                        adapters_(slot, backend));
    weight->adapters.insert(weight->adapters.end(), adapters.begin(), adapters.end());
  }
  return weights;
}

}  // namespace quantmill
