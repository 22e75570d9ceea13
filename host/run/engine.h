// The block loop: for each block, for each stage, quantize the stage's slots and put the results
// into the block before its outputs become the next block's inputs.
//
//   block b: [load] -> stage 1: statistics (once for all stages) -> calls -> save unit
//                   -> stage 2: ...
//                   -> advance hidden states with the new weights -> [release] -> block b + 1
//
// Statistics of a block are measured with its dense weights on inputs that come from the blocks as
// quantized so far (or from the untouched model); a transform's edits change them exactly or make
// them be measured again (block_state.h). A `sequential` stage measures again before every input
// group, with all that is packed so far in the block in place.
//
// A transform's unit holds its edits, not what they made of the weights: they are applied again
// wherever the block is needed, and to the statistics at the point where they were first.
//
// A tuning's unit holds the packed weights it changed, which are exported in the place of those of
// the unit before, and its edits of norms and biases.
//
// A training works on the model as a whole, behind all of that, and leaves one unit per block.
//
// Finished units are loaded instead of computed; activations are recomputed from them, up to the
// last block whose statistics are still wanted. Without statistics no activation is ever computed
// and memory stays at about a block.
#ifndef QUANTMILL_HOST_RUN_ENGINE_H_
#define QUANTMILL_HOST_RUN_ENGINE_H_

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/calib/calibration.h"
#include "core/model/dense_source.h"
#include "host/run/block_state.h"
#include "host/run/calibration_text.h"
#include "host/run/method_runner.h"
#include "host/run/slot_work.h"
#include "host/run/stage_set.h"
#include "host/run/train/adapted_source.h"
#include "host/run/train/plugin_adapter.h"
#include "host/run/train/reparam_calls.h"
#include "host/run/transform_work.h"
#include "host/run/tune_work.h"
#include "host/run/unit_keys.h"
#include "host/run/unit_store.h"
#include "host/supervisor/journal.h"
#include "host/worker/formats.h"

namespace quantmill {

struct EngineInputs {
  const PipelinePlan* plan = nullptr;
  const StageSet* stages = nullptr;
  DenseSource* source = nullptr;
  Backend* backend = nullptr;
  MethodRunner* runner = nullptr;
  TransformRunner* transforms = nullptr;
  TuneRunner* tuning = nullptr;
  ReparamCalls* training = nullptr;
  PluginFormats* formats = nullptr;
  FormatWords* format_words = nullptr;  // of `formats`; may be null
  ModelDigests* digests = nullptr;
  const JournalState* journal = nullptr;
  std::string work_dir;
  EventSink sink;
  Tensor windows;  // I32 [windows, length] on the host; empty without statistics
  std::string calibration_digest;
  std::map<std::string, TrainingText> texts;  // by training stage
};

class Engine {
 public:
  explicit Engine(EngineInputs inputs);
  ~Engine();

  // Computes or loads every unit.
  absl::Status Run();

  // Units in the order they ran, without their tensors (which are in the store).
  const std::vector<Unit>& units() const { return units_; }
  // The packed weight to export for a slot; null if it stays dense.
  absl::StatusOr<std::shared_ptr<const PackedWeight>> Packed(const std::string& slot);
  // The edits of a decoder layer's dense tensors, in order. Their units are loaded from the store.
  absl::StatusOr<std::vector<BlockEdit>> Edits(int64_t block);
  // The decoder layer in which a tensor was edited, or -1.
  int64_t EditedIn(const std::string& tensor) const;
  // The adapters of a slot, in the order of their stages.
  struct Adapter {
    const PreparedStage* stage = nullptr;
    size_t index = 0;                 // of the slot in the stage
    std::vector<NamedTensor> params;  // F32 on the host
  };
  absl::StatusOr<std::vector<Adapter>> Adapters(const std::string& slot);
  bool HasAdapters() const { return !adapters_.empty(); }
  // The same, ready to run; valid as long as this object.
  AdapterLookup LoadedAdapters();
  // Units that were loaded instead of computed.
  int64_t reused_units() const { return reused_; }

 private:
  struct Place {
    std::string key, digest;  // of the unit
    int64_t block = 0;
  };
  // A unit to look into; valid until one of another block is opened.
  absl::StatusOr<const Unit*> Opened(const Place& place);
  std::vector<size_t> SlotsIn(const PreparedStage& stage, int64_t block) const;
  void FindUnfinishedBlocks();
  bool Usable(const std::string& key);
  absl::Status StartCalibration();
  absl::Status RunBlock(int64_t block);
  absl::Status RunHead();
  absl::Status RunTraining(const PreparedStage& stage);
  absl::StatusOr<std::vector<Unit>> ComputeTraining(const PreparedStage& stage,
                                                    const std::string& key);
  absl::Status RunStage(const PreparedStage& stage, const std::vector<size_t>& slots,
                        BlockState* state);
  absl::StatusOr<Unit> ComputeUnit(const PreparedStage& stage, const std::vector<size_t>& slots,
                                   const UnitKeys& keys, BlockState* state);
  absl::StatusOr<Unit> ComputeTransform(const PreparedStage& stage,
                                        const std::vector<size_t>& slots, const UnitKeys& keys,
                                        BlockState* state);
  absl::StatusOr<Unit> ComputeTuning(const PreparedStage& stage, const std::vector<size_t>& slots,
                                     const UnitKeys& keys, BlockState* state);
  // Measures what this and later stages want and the state does not have.
  absl::Status CollectShared(const PreparedStage& stage, BlockState* state);
  absl::Status Collect(const std::vector<StatRequest>& requests, const BlockWeights& weights,
                       const BlockState& state, Statistics* out);
  // Puts the stage's results for these slots into the block the next statistics are measured with.
  absl::Status PutIntoBlock(const PreparedStage& stage, const std::vector<size_t>& slots,
                            const Unit& unit, BlockState* state);
  // Keeps what is asked for after Run.
  void Remember(Unit unit);
  bool LaterNeeds(const PreparedStage& stage, int64_t block) const;
  void Progress(const std::string& stage, const std::string& unit, int64_t done, int64_t total);

  EngineInputs in_;
  UnitStore store_;
  KeyChain chain_;
  SlotWorker worker_;
  TransformWorker transform_worker_;
  TuneWorker tune_worker_;
  std::unique_ptr<Calibration> calibration_;
  std::string current_stage_;
  std::string current_part_;  // of the stage, for progress
  int64_t current_block_ = 0;
  bool single_original_stream_ = false;
  int64_t last_measured_block_ = -1;
  std::set<int64_t> unfinished_;  // blocks with a unit that is to be computed
  std::vector<Unit> units_;
  std::map<std::string, bool> usable_;                  // finished units whose files were looked at
  std::map<std::string, Place> exported_;               // by slot
  std::map<int64_t, std::vector<Place>> transforms_;    // units with edits, by block
  std::map<std::string, int64_t> edited_;               // tensor -> block
  std::map<std::string, std::vector<Place>> adapters_;  // by slot
  // Units of open_block_ that were looked into, by key: stages may alternate from slot to slot.
  std::map<std::string, Unit> open_units_;
  int64_t open_block_ = -1;
  int64_t reused_ = 0;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_ENGINE_H_
