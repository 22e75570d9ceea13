// Transforming a block: a method's edits, checked, or why there are none.
#ifndef QUANTMILL_HOST_RUN_TRANSFORM_WORK_H_
#define QUANTMILL_HOST_RUN_TRANSFORM_WORK_H_

#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/calib/calibration.h"
#include "host/run/block_state.h"
#include "host/run/slot_work.h"
#include "host/run/transform_runner.h"

namespace quantmill {

// Most that trial runs keep of a submodule's inputs and outputs (core/calib/block_trials.h).
inline constexpr int64_t kTrialCacheBytes = int64_t{256} << 20;

struct TransformWork {
  const PreparedStage* stage = nullptr;
  std::vector<size_t> slots;  // of the stage in this block
  UnitKeys keys;
  BlockState* state = nullptr;
  Calibration* calibration = nullptr;  // null: no calibration text
  bool single_original_stream = false;
};

struct TransformResult {
  std::vector<SlotRecord> records;  // one per slot
  std::vector<BlockEdit> edits;     // checked, not applied to the state yet
  std::set<std::string> changed;    // names of the tensors they change
};

class TransformWorker {
 public:
  TransformWorker(SlotWorkInputs inputs, TransformRunner& runner)
      : in_(std::move(inputs)), runner_(runner) {}

  // An error ends the run: on_error is `stop`, or the device is lost. With another on_error a
  // failed transform leaves the block as it was.
  absl::StatusOr<TransformResult> Run(const TransformWork& work);

 private:
  absl::StatusOr<std::vector<BlockEdit>> Propose(const TransformWork& work,
                                                 TransformOutcome* outcome);
  absl::Status Check(const TransformWork& work, const std::vector<BlockEdit>& edits,
                     std::set<std::string>* changed);
  // The input the edited block is checked on: [rows, hidden] F32 on the device.
  absl::StatusOr<Tensor> SampleInput(const TransformWork& work);
  std::vector<SlotRecord> Records(const TransformWork& work, const TransformOutcome& outcome,
                                  const std::vector<BlockEdit>& edits, double seconds,
                                  const std::string& error) const;
  const TransformBlock& BlockOf(const TransformWork& work) const {
    return work.stage->parts.at(work.state->index()).block;
  }

  SlotWorkInputs in_;
  TransformRunner& runner_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TRANSFORM_WORK_H_
