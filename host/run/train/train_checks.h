// What a training stage takes, and what its export target must be able to hold; known before any
// work.
#ifndef QUANTMILL_HOST_RUN_TRAIN_TRAIN_CHECKS_H_
#define QUANTMILL_HOST_RUN_TRAIN_TRAIN_CHECKS_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "core/eval/self_text.h"
#include "host/run/stage_set.h"

namespace quantmill {

// Bytes a training holds at most, beside what the program takes. model_bytes: of the original's
// tensors.
int64_t TrainingBytes(const PipelinePlan& plan, const PreparedStage& stage, DrawingDevice device,
                      int64_t model_bytes);

// Bytes of a slot's parameters, in the unit or in the adapter's files.
int64_t AdapterBytes(const PreparedStage& stage, size_t index);

// FAILED_PRECONDITION when `target` cannot hold what the stage leaves: dense files no adapters,
// peft files nothing else, and neither adapters whose options differ from layer to layer.
absl::Status CheckAdapters(const std::string& target, const PreparedStage& stage);

// Does a stage train adapters that give the original's answers from the start? Nothing is packed or
// changed before it, and it learns from the original.
bool HasNothingToLearn(const PreparedStage& stage, const StageSet& stages);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TRAIN_TRAIN_CHECKS_H_
