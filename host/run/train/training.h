// A training stage: initialises its linears, trains them block by block and then end to end, and
// says what became of them.
#ifndef QUANTMILL_HOST_RUN_TRAIN_TRAINING_H_
#define QUANTMILL_HOST_RUN_TRAIN_TRAINING_H_

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/model/block_edits.h"
#include "core/model/weights.h"
#include "core/train/training_data.h"
#include "host/pipeline/plan.h"
#include "host/run/stage_set.h"
#include "host/run/train/reparam_calls.h"
#include "host/run/unit_source.h"
#include "host/supervisor/process.h"

namespace quantmill {

struct TrainingInputs {
  const PipelinePlan* plan = nullptr;
  const StageSet* stages = nullptr;
  const PreparedStage* stage = nullptr;
  WeightSource* original = nullptr;  // the teacher
  WeightSource* dense = nullptr;     // the original with edits, nothing packed
  WeightSource* current = nullptr;   // with what earlier stages packed and adapted
  PackedLookup packed;               // of earlier stages
  Backend* backend = nullptr;
  ReparamCalls* calls = nullptr;
  FormatRegistry* formats = nullptr;
  const TrainingData* data = nullptr;
  std::string key;        // of this training
  std::string crash_dir;  // for the inputs of calls that fail, a folder per linear
  // Names of linears with calls that ended with the process.
  std::function<bool(const std::string&)> crashed;
  std::string state_file;  // of it alone
  std::string loss_file;
  EventSink sink;
};

// What a slot became: one of packed and folded, or neither (an adapter).
struct TrainedResult {
  size_t index = 0;  // of the slot in its stage
  std::shared_ptr<const PackedWeight> packed;
  Tensor folded;                     // F32 on the host
  std::vector<NamedTensor> adapter;  // F32 on the host
  double weight_nmse = 0;            // against the original weight
};

struct TrainingResult {
  std::vector<TrainedResult> slots;
  // New contents of norms, folded weights and embeddings by block; number of layers: outside.
  std::map<int64_t, std::vector<BlockEdit>> edits;
  double first_loss = 0, last_loss = 0;  // means over some steps
  double seconds = 0;
  int64_t tokens = 0;  // trained on in this process, end to end
};

// Does a stage train what is outside of the blocks, too? Where it trains weights end to end.
bool TrainsEnds(const PreparedStage& stage);

// FAILED_PRECONDITION when the training fails (not finite, diverging); states saved so far stay.
absl::StatusOr<TrainingResult> RunTraining(const TrainingInputs& inputs);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TRAIN_TRAINING_H_
