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
#include "host/run/tune_parts.h"
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
  // Calls of this block that ended with the process; *how: the last one's.
  int Crashes(const TuneWork& work, std::string* how) const;
  RunContext ContextFor(const TuneWork& work) const;
  absl::StatusOr<TuneTask> MakeTask(const TuneWork& work, BlockTrials* trials);
  // Calls the method and judges what it made; the inputs of a call that failed are kept.
  absl::Status Attempt(const TuneWork& work, TuneOutcome* outcome, TuneComparison* comparison,
                       TuneResult* result);
  absl::Status Judge(const TuneWork& work, const TuneTask& task, const TuneOutcome& outcome,
                     TuneComparison* comparison, TuneResult* result);
  void AddRecords(const TuneWork& work, const TuneOutcome& outcome,
                  const TuneComparison& comparison, double seconds, const std::string& error,
                  TuneResult* result) const;
  const TransformBlock& BlockOf(const TuneWork& work) const {
    return work.stage->parts.at(work.state->index()).block;
  }

  SlotWorkInputs in_;
  TuneRunner& runner_;
  int failure_bundles_ = 0;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TUNE_WORK_H_
