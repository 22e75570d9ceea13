#include "host/bench/stored_bits.h"

#include "absl/strings/match.h"
#include "core/base/status.h"
#include "core/io/checkpoint_files.h"
#include "core/model/config.h"
#include "core/model/graph.h"

namespace quantmill {

absl::StatusOr<double> StoredBitsPerWeight(const std::string& directory) {
  QM_ASSIGN_OR_RETURN(const ModelConfig config, ReadModelConfig(directory));
  QM_ASSIGN_OR_RETURN(const auto checkpoint, Checkpoint::Open(directory));
  double bits = 0, weights = 0;
  for (const LinearSlot& slot : AllSlots(config)) {
    weights += static_cast<double>(slot.out_features) * static_cast<double>(slot.in_features);
    for (const CheckpointTensor& tensor : checkpoint->TensorsUnder(slot.name + ".")) {
      if (absl::EndsWith(tensor.entry->name, ".bias")) continue;
      bits += 8.0 * static_cast<double>(tensor.entry->end - tensor.entry->begin);
    }
  }
  return weights > 0 ? bits / weights : 0;
}

}  // namespace quantmill
