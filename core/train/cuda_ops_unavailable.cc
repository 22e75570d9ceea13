// Stands in for the CUDA backward passes in a build without CUDA.
#include "core/train/device_ops.h"

namespace quantmill {

std::unique_ptr<TrainingOps> MakeCudaTrainingOps(Backend& /*backend*/) { return nullptr; }

}  // namespace quantmill
