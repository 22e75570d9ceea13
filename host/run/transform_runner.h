// Calls a method's block-transform table for one block, with everything around a call: options,
// seed, views of weights, statistics and sites, last words.
#ifndef QUANTMILL_HOST_RUN_TRANSFORM_RUNNER_H_
#define QUANTMILL_HOST_RUN_TRANSFORM_RUNNER_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/calib/block_trials.h"
#include "core/calib/statistics.h"
#include "core/model/block_edits.h"
#include "core/model/graph.h"
#include "core/model/sites.h"
#include "core/model/weights.h"
#include "core/tensor/backend.h"
#include "host/plugins/registry.h"
#include "host/run/block_view.h"
#include "host/run/method_runner.h"
#include "host/supervisor/last_words.h"
#include "host/supervisor/process.h"

namespace quantmill {

inline constexpr char kTransformPlanFunction[] = "block-transform.plan";
inline constexpr char kTransformRunFunction[] = "block-transform.run";
// Of RULES.md: what edits promise.
inline constexpr char kEditRule[] = "QM-C-007";

// Sites of the block whose linears are all among its `slots`.
std::vector<ScaleSite> SitesAmong(const ModelConfig& config, const TransformBlock& block);

// What plan() said about a block.
struct TransformPlan {
  // Wanted of the inputs of every slot; input_group is left -1.
  std::vector<SlotPlan::Stat> stats;
  uint64_t scratch_bytes = 0;
  double flops = 0;
};

struct TransformTask {
  const TransformBlock* block = nullptr;
  const TransformPlan* plan = nullptr;
  const ResolvedOptions* options = nullptr;
  std::vector<Tensor> weights;        // F32 [out, in] on the device, per slot
  const Statistics* stats = nullptr;  // null: the plan asks for none
  bool stats_from_original = false;   // the single stream of the calibration is the untouched one
  uint64_t seed = 0;
  BlockTrials* trials = nullptr;  // null: no calibration text
  // What the trials run on, to be written down if the call fails.
  const ModelConfig* config = nullptr;
  const BlockWeights* dense = nullptr;
  int64_t windows = 0;
  std::function<absl::StatusOr<Tensor>(int64_t window)> inputs;
};

struct TransformOutcome {
  absl::Status status;
  std::vector<BlockEdit> edits;  // as proposed, values copied to the host; not checked
  uint64_t scratch_peak = 0;
};

class TransformRunner {
 public:
  // `words` may be null. Both must outlive this object. `config_file`: the model's config.json,
  // named to who survives a call that crashes.
  TransformRunner(Backend& backend, LastWords* words, EventSink sink, std::string config_file);

  absl::StatusOr<TransformPlan> Plan(const LoadedMethod& method, const std::string& stage,
                                     const TransformBlock& block, const ResolvedOptions& options);
  // Writes the call's inputs to context.BundleOf(block) first if context.bundle says so.
  TransformOutcome Run(const LoadedMethod& method, const RunContext& context,
                       const TransformTask& task);

  // Writes the inputs of run() to context.BundleOf(block), to be called again from there
  // (host/run/transform_bundle.h).
  absl::Status SaveCall(const LoadedMethod& method, const RunContext& context,
                        const TransformTask& task);

 private:
  CallSettings Settings(const LoadedMethod& method, const std::string& stage,
                        const std::string& function, const TransformTask& task);
  nlohmann::json Words(const LoadedMethod& method, const RunContext& context,
                       const std::string& function, const TransformTask& task) const;

  Backend& backend_;
  LastWords* words_;
  EventSink sink_;
  std::string config_file_;
  PluginLog log_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TRANSFORM_RUNNER_H_
