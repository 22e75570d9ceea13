// The block loop: for each block, for each stage, quantize the stage's slots and put the results
// into the block before its outputs become the next block's inputs.
//
//   block b: [load] -> stage 1: statistics (once for all stages) -> calls -> save unit
//                   -> stage 2: ...
//                   -> advance hidden states with the new weights -> [release] -> block b + 1
//
// Statistics of a block are measured with its untouched weights on inputs that come from the blocks
// as quantized so far (or from the untouched model). A `sequential` stage measures again before
// every input group, with all that is packed so far in the block in place.
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
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/calib/calibration.h"
#include "core/model/dense_source.h"
#include "host/run/method_runner.h"
#include "host/run/slot_work.h"
#include "host/run/stage_set.h"
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
  PluginFormats* formats = nullptr;
  ModelDigests* digests = nullptr;
  const JournalState* journal = nullptr;
  std::string work_dir;
  EventSink sink;
  Tensor windows;  // I32 [windows, length] on the host; empty without statistics
  std::string calibration_digest;
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
  // Units that were loaded instead of computed.
  int64_t reused_units() const { return reused_; }

 private:
  struct BlockState;
  std::vector<size_t> SlotsIn(const PreparedStage& stage, int64_t block) const;
  void FindLastMeasuredBlock();
  bool Usable(const std::string& key);
  absl::Status StartCalibration();
  absl::Status RunBlock(int64_t block);
  absl::Status RunHead();
  absl::Status RunStage(const PreparedStage& stage, const std::vector<size_t>& slots,
                        BlockState* state);
  absl::StatusOr<Unit> ComputeUnit(const PreparedStage& stage, const std::vector<size_t>& slots,
                                   const UnitKeys& keys, BlockState* state);
  absl::Status CollectShared(BlockState* state);
  absl::StatusOr<Statistics> Collect(const std::vector<StatRequest>& requests,
                                     const BlockWeights& weights, const BlockState& state);
  // Puts the stage's results for these slots into the block the next statistics are measured with.
  absl::Status PutIntoBlock(const PreparedStage& stage, const std::vector<size_t>& slots,
                            const Unit& unit, BlockState* state);
  bool LaterNeeds(const PreparedStage& stage, int64_t block) const;
  void Progress(const std::string& stage, const std::string& unit, int64_t done, int64_t total);

  EngineInputs in_;
  UnitStore store_;
  KeyChain chain_;
  SlotWorker worker_;
  std::unique_ptr<Calibration> calibration_;
  std::string current_stage_;
  std::string current_part_;  // of the stage, for progress
  int64_t current_block_ = 0;
  bool single_original_stream_ = false;
  int64_t last_measured_block_ = -1;
  std::vector<Unit> units_;
  std::map<std::string, bool> usable_;  // finished units whose files were looked at
  struct Place {
    std::string key, digest;  // of the unit
    int64_t block = 0;
  };
  std::map<std::string, Place> exported_;  // by slot
  // Units of open_block_ that Packed() looked into, by key: stages may alternate from slot to slot.
  std::map<std::string, Unit> open_units_;
  int64_t open_block_ = -1;
  int64_t reused_ = 0;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_ENGINE_H_
