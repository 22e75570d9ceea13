// Quantizing the slots of one input group: weights in, packed weights and their errors out, with
// the stage's on_error applied.
#ifndef QUANTMILL_HOST_RUN_SLOT_WORK_H_
#define QUANTMILL_HOST_RUN_SLOT_WORK_H_

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/calib/statistics.h"
#include "core/model/weights.h"
#include "host/run/format_words.h"
#include "host/run/method_runner.h"
#include "host/run/stage_set.h"
#include "host/run/unit_keys.h"
#include "host/run/unit_store.h"
#include "host/supervisor/journal.h"
#include "host/worker/formats.h"

namespace quantmill {

// A call that takes a worker down is made once more in a fresh one.
inline constexpr int kCallAttempts = 2;
// A method may refuse every layer, and the inputs of a call are as large as the layer's Hessian.
inline constexpr int kMostFailureBundles = 8;

// "; repeat the call with: ..." if the folder holds the inputs of a call.
std::string ReplayHint(const std::string& bundle);

// DATA_LOSS naming the first weight that is not finite. weight: F32 [out, in] on the backend.
absl::Status CheckFinite(const Tensor& weight, const std::string& slot, Backend& backend);

struct SlotWorkInputs {
  const PipelinePlan* plan = nullptr;
  const StageSet* stages = nullptr;
  Backend* backend = nullptr;
  MethodRunner* runner = nullptr;
  PluginFormats* formats = nullptr;
  FormatWords* format_words = nullptr;  // of `formats`; may be null
  const JournalState* journal = nullptr;
  std::string work_dir;
  EventSink sink;
};

// One input group of a stage in a block.
struct GroupWork {
  const PreparedStage* stage = nullptr;
  std::vector<size_t> slots;  // indices into the stage's slots, equal input group
  std::vector<Tensor> dense;  // their weights, any model float dtype, on the device
  UnitKeys keys;
  const Statistics* stats = nullptr;
  bool stats_from_original = false;
};

struct SlotResult {
  SlotRecord record;
  std::shared_ptr<const PackedWeight> packed;  // null: stays dense
};

class SlotWorker {
 public:
  explicit SlotWorker(SlotWorkInputs inputs) : in_(std::move(inputs)) {}

  // One result per slot. An error ends the run: on_error is `stop`, a weight is not finite, or the
  // device is lost.
  absl::StatusOr<std::vector<SlotResult>> Run(const GroupWork& work);

 private:
  absl::StatusOr<SlotTask> MakeTask(const GroupWork& work, size_t index, const BoundMethod& method,
                                    const ResolvedOptions& options);
  std::vector<std::vector<size_t>> EqualOptions(const GroupWork& work) const;
  // How often the call for this slot took a worker down, and the last report of it.
  int Crashes(const std::string& attempt, const std::string& slot, std::string* how) const;
  RunContext ContextFor(const GroupWork& work) const;
  // Last words of what a format does with the result of a slot.
  nlohmann::json PurposeOf(const GroupWork& work, const LinearSlot& slot) const;
  // One outcome per task, however they are called.
  std::vector<SlotOutcome> Call(const GroupWork& work, const RunContext& context,
                                absl::Span<const SlotTask> tasks);
  // The slot's result, or what on_error makes of its failure.
  absl::StatusOr<SlotResult> Finish(const GroupWork& work, const RunContext& context, size_t index,
                                    const ResolvedOptions& options, const SlotTask& task,
                                    SlotOutcome outcome);
  absl::StatusOr<SlotResult> Accept(const GroupWork& work, size_t index, const BoundMethod& method,
                                    const ResolvedOptions& options, const SlotTask& task,
                                    SlotOutcome outcome);
  // bundle: the folder with the call's inputs, if there is one.
  absl::StatusOr<SlotResult> HandleFailure(const GroupWork& work, size_t index,
                                           const absl::Status& failure, const std::string& bundle);
  absl::Status MeasureErrors(const GroupWork& work, const SlotTask& task,
                             const PackedWeight& packed, SlotRecord* record);
  absl::StatusOr<double> OutputError(const GroupWork& work, const SlotTask& task,
                                     const LinearWeight& packed, int64_t* rows);
  const LinearSlot& SlotOf(const GroupWork& work, size_t index) const;
  void Warn(const std::string& text) const;

  SlotWorkInputs in_;
  int failure_bundles_ = 0;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_SLOT_WORK_H_
