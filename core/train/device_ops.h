// The implementations of TrainingOps, one per kind of device; use MakeTrainingOps.
#ifndef QUANTMILL_CORE_TRAIN_DEVICE_OPS_H_
#define QUANTMILL_CORE_TRAIN_DEVICE_OPS_H_

#include <memory>

#include "core/train/adamw_factors.h"
#include "core/train/training_ops.h"

namespace quantmill {

AdamWFactors FactorsOf(const AdamWStep& step);

std::unique_ptr<TrainingOps> MakeCpuTrainingOps(Backend& backend);
// Null in a build without CUDA.
std::unique_ptr<TrainingOps> MakeCudaTrainingOps(Backend& backend);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TRAIN_DEVICE_OPS_H_
