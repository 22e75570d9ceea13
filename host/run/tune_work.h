// Tuning a packed block: what the method made of it, checked and compared, or why it stays as
// packed.
#ifndef QUANTMILL_HOST_RUN_TUNE_WORK_H_
#define QUANTMILL_HOST_RUN_TUNE_WORK_H_

#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/calib/calibration.h"
#include "host/run/block_state.h"
#include "host/run/slot_work.h"
#include "host/run/tune_runner.h"

namespace quantmill {

struct TuneWork {
  const PreparedStage* stage = nullptr;
  std::vector<size_t> slots;  // of the stage in this block
  UnitKeys keys;
  BlockState* state = nullptr;
  Calibration* calibration = nullptr;
  const Unit* packed = nullptr;  // what the stage's packing made of the block
};

struct TuneResult {
  std::vector<SlotRecord> records;                                    // one per packed slot
  std::map<std::string, std::shared_ptr<const PackedWeight>> packed;  // slots that were changed
  std::vector<BlockEdit> edits;   // checked, not applied to the state yet
  std::set<std::string> changed;  // names of the tensors they change
};

class TuneWorker {
 public:
  TuneWorker(SlotWorkInputs inputs, TuneRunner& runner) : in_(std::move(inputs)), runner_(runner) {}

  // An error ends the run: on_error is `stop`, or the device is lost. With another on_error a
  // failed tuning leaves the block as packed; so does one that makes it worse.
  absl::StatusOr<TuneResult> Run(const TuneWork& work);

 private:
  // What tuning changed, measured.
  struct Comparison {
    double loss_before = -1, loss_after = -1;
    std::vector<double> weight_nmse;  // per slot, after; of tuned ones
  };
  absl::Status RefuseCrashed(const TuneWork& work) const;
  absl::StatusOr<TuneTask> MakeTask(const TuneWork& work, BlockTrials* trials);
  absl::Status Check(const TuneWork& work, const TuneTask& task, const TuneOutcome& outcome,
                     std::set<std::string>* changed) const;
  // Of the block with these packed weights and edits, on the first windows.
  absl::StatusOr<double> Loss(const TuneTask& task, const std::vector<const PackedWeight*>& packed,
                              const std::vector<BlockEdit>& edits);
  absl::StatusOr<Comparison> Compare(const TuneTask& task, const TuneOutcome& outcome);
  absl::StatusOr<double> WeightError(const Tensor& weight, const PackedWeight& packed);
  // Calls the method and judges what it made.
  absl::Status Attempt(const TuneWork& work, TuneOutcome* outcome, Comparison* comparison,
                       TuneResult* result);
  void AddRecords(const TuneWork& work, const TuneOutcome& outcome, const Comparison& comparison,
                  double seconds, const std::string& error, TuneResult* result) const;
  const TransformBlock& BlockOf(const TuneWork& work) const {
    return work.stage->parts.at(work.state->index()).block;
  }

  SlotWorkInputs in_;
  TuneRunner& runner_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TUNE_WORK_H_
