// Transforming a block: a method's edits, checked, or why there are none.
#ifndef QUANTMILL_HOST_RUN_TRANSFORM_WORK_H_
#define QUANTMILL_HOST_RUN_TRANSFORM_WORK_H_

#include <optional>
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
  // A call's inputs, with what they point to.
  struct PreparedCall {
    TransformTask task;
    std::optional<BlockTrials> trials;
  };
  absl::Status Prepare(const TransformWork& work, PreparedCall* call);
  // Checked edits; the names of the tensors they change go to *changed.
  absl::StatusOr<std::vector<BlockEdit>> Propose(const TransformWork& work,
                                                 const RunContext& context,
                                                 const TransformTask& task,
                                                 TransformOutcome* outcome,
                                                 std::set<std::string>* changed);
  // How often the call for this block took a worker down, and the last report of it.
  int Crashes(const TransformWork& work, std::string* how) const;
  RunContext ContextFor(const TransformWork& work) const;
  // The block as it was, or the failure, as on_error says. bundle: the folder with the call's
  // inputs, if there is one.
  absl::StatusOr<TransformResult> HandleFailure(const TransformWork& work,
                                                const absl::Status& failure,
                                                const std::string& bundle,
                                                const TransformOutcome& outcome, double seconds);
  absl::Status Check(const TransformWork& work, const std::vector<BlockEdit>& edits,
                     std::set<std::string>* changed);
  std::vector<SlotRecord> Records(const TransformWork& work, const TransformOutcome& outcome,
                                  const std::vector<BlockEdit>& edits, double seconds,
                                  const std::string& error) const;
  const TransformBlock& BlockOf(const TransformWork& work) const {
    return work.stage->parts.at(work.state->index()).block;
  }

  SlotWorkInputs in_;
  TransformRunner& runner_;
  int failure_bundles_ = 0;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TRANSFORM_WORK_H_
