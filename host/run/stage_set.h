// The stages of a checked pipeline, bound to loaded methods and with every slot's plan().
#ifndef QUANTMILL_HOST_RUN_STAGE_SET_H_
#define QUANTMILL_HOST_RUN_STAGE_SET_H_

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/io/checkpoint_files.h"
#include "host/pipeline/plan.h"
#include "host/plugins/catalog.h"
#include "host/plugins/registry.h"
#include "host/run/method_runner.h"
#include "host/run/train/reparam_calls.h"
#include "host/run/transform_runner.h"
#include "host/run/tune_runner.h"

namespace quantmill {

// A method a stage runs, and where it came from.
struct BoundMethod {
  LoadedMethod loaded;
  std::string plugin_sha256;
  std::vector<SlotPlan> plans;  // one per slot of the stage
};

struct StageSet;

// One ABI table of a stage of the pipeline: a method that transforms, quantizes and tunes gives
// three.
struct PreparedStage {
  const PlannedStage* stage = nullptr;
  int index = 0;            // of `stage` in the plan
  bool transforms = false;  // qm.block-transform/1
  bool tunes = false;       // qm.block-tune/1
  bool trains = false;      // qm.reparametrize/1; none of the three: qm.quantize-linear/1
  struct Part {
    TransformBlock block;
    TransformPlan plan;  // of a transform
    TunePlan tuning;
  };
  std::map<int64_t, Part> parts;  // of a transform or a tuning, by decoder layer
  BoundMethod method;
  std::optional<BoundMethod> fallback;  // on_error: {use: ...}
  bool sequential = false;              // measure again after every input group
  bool from_original = false;           // statistics of the untouched model by default
  bool needs_statistics = false;        // or, of a transform, runs the block
  bool uses_quantized_stream = false;
  bool uses_original_stream = false;
  // Of a training, per slot of the stage: what is trained in each phase; nullopt: nothing.
  std::vector<std::optional<ReparamPlan>> block_plans, model_plans;
  // Of a training: what the slots are packed as before it; no tensors. Null: dense.
  std::vector<std::shared_ptr<const PackedWeight>> bases;

  // The plan of either phase; null: the slot is left alone.
  const ReparamPlan* AnyPlan(size_t index) const;
  bool HasPhase(qm_reparam_phase phase) const;
  // A slot under the stage's method, its base without tensors.
  ReparamSubject SubjectOf(const PipelinePlan& plan, const StageSet& stages, size_t index) const;

  const ResolvedOptions& OptionsOf(size_t index) const { return stage->options[index]; }
  // All requests for the slots with these indices; of a packing stage with the sample for output
  // errors.
  std::vector<StatRequest> Requests(const std::vector<size_t>& indices) const;
};

// Rows of calibration input on which the error of a linear's output is measured.
inline constexpr int64_t kOutputSampleRows = 256;

struct StageSet {
  std::vector<PreparedStage> stages;
  DType scale_dtype = DType::kF16;
  std::vector<DType> weight_dtypes;  // per slot of the plan, as stored
  // Also where a transform runs and there is calibration text, and where a block is tuned: their
  // trials and checks use that.
  bool NeedsStatistics() const;
  bool Transforms() const;
  bool Trains() const;
  bool UsesQuantizedStream() const;
  bool UsesOriginalStream() const;
};

// The dtype in which `target` stores scales: F16 for gptq and awq, the model's for
// compressed-tensors, else F16 for 16-bit models and F32 for F32 models.
DType ScaleDType(std::string_view target, DType model_dtype);

// `plan` must outlive the result. UNIMPLEMENTED for stages that need another table than
// qm.block-transform/1, qm.quantize-linear/1 and qm.block-tune/1 behind that, or
// qm.reparametrize/1.
absl::StatusOr<StageSet> PrepareStages(const PipelinePlan& plan, const Catalog& catalog,
                                       const std::vector<LoadedMethod>& methods,
                                       const Checkpoint& checkpoint, MethodRunner& runner,
                                       TransformRunner& transforms, TuneRunner& tuning,
                                       ReparamCalls& training);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_STAGE_SET_H_
