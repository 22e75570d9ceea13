// A training as units: its key, and one unit per block from its result.
#ifndef QUANTMILL_HOST_RUN_TRAIN_TRAIN_UNITS_H_
#define QUANTMILL_HOST_RUN_TRAIN_TRAIN_UNITS_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "host/run/train/training.h"
#include "host/run/unit_store.h"
#include "host/supervisor/journal.h"

namespace quantmill {

// What a training depends on besides its stage.
struct TrainingDigests {
  std::string model, data;
  const std::vector<Unit>* units = nullptr;  // of the stages before it
};

// Differs for everything that changes the result; holds no device, thread count or time.
std::string TrainingKey(const PipelinePlan& plan, const StageSet& stages,
                        const PreparedStage& stage, DType activation,
                        const TrainingDigests& digests);

// Of the unit that a block gets.
std::string TrainedUnitKey(const std::string& training_key, int64_t block);

// Blocks with slots that the stage trains, ascending; the number of layers if it trains more.
std::vector<int64_t> TrainedBlocks(const PipelinePlan& plan, const PreparedStage& stage);

// One unit per block, without keys' digests.
std::vector<Unit> TrainedUnits(const PipelinePlan& plan, const PreparedStage& stage,
                               const std::string& training_key, TrainingResult result);

// ABORTED when calls of this training have crashed as often as they are tried; says where their
// inputs are, below `crash_dir`.
absl::Status RefuseCrashedTraining(const JournalState& journal, const std::string& training_key,
                                   const std::string& crash_dir);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TRAIN_TRAIN_UNITS_H_
