// Calls a method's block-tune table for one block, with everything around a call: options, seed,
// views of the dense and the packed weights, last words.
#ifndef QUANTMILL_HOST_RUN_TUNE_RUNNER_H_
#define QUANTMILL_HOST_RUN_TUNE_RUNNER_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/calib/block_trials.h"
#include "core/formats/packed.h"
#include "core/model/block_edits.h"
#include "core/model/config.h"
#include "core/model/weights.h"
#include "core/tensor/backend.h"
#include "host/plugins/registry.h"
#include "host/run/block_view.h"
#include "host/run/method_runner.h"
#include "host/supervisor/last_words.h"
#include "host/supervisor/process.h"

namespace quantmill {

inline constexpr char kTunePlanFunction[] = "block-tune.plan";
inline constexpr char kTuneRunFunction[] = "block-tune.run";

// What plan() said about tuning a block.
struct TunePlan {
  uint64_t scratch_bytes = 0;
  double flops = 0;
};

struct TuneTask {
  const TransformBlock* block = nullptr;
  const TunePlan* plan = nullptr;
  const ResolvedOptions* options = nullptr;
  std::vector<Tensor> weights;       // F32 [out, in] on the device, per slot: before packing
  std::vector<PackedWeight> packed;  // per slot, on the device; format_id empty: dense
  std::vector<NamedTensor> others;   // norms and biases of the block, F32 on the device
  uint64_t seed = 0;
  BlockTrials* trials = nullptr;
  // What the trials run on, to be written down if the call fails.
  const ModelConfig* config = nullptr;
  const BlockWeights* dense = nullptr;
  int64_t windows = 0;
  std::function<absl::StatusOr<Tensor>(int64_t window)> inputs;
};

struct TuneOutcome {
  absl::Status status;
  // Per slot, on the host, with the tensors that were emitted in the place of the old; nullopt:
  // nothing was emitted for it.
  std::vector<std::optional<PackedWeight>> tuned;
  std::vector<BlockEdit> edits;  // values copied to the host; not checked
  uint64_t scratch_peak = 0;
};

class TuneRunner {
 public:
  // `words` may be null. Both must outlive this object. `config_file`: the model's config.json,
  // named to who survives a call that crashes.
  TuneRunner(Backend& backend, LastWords* words, EventSink sink, std::string config_file);

  // nullopt: the method wants no tuning with these options.
  absl::StatusOr<std::optional<TunePlan>> Plan(const LoadedMethod& method, const std::string& stage,
                                               const TransformBlock& block,
                                               const ResolvedOptions& options);
  // Writes the call's inputs to context.BundleOf(block) first if context.bundle says so.
  TuneOutcome Run(const LoadedMethod& method, const RunContext& context, const TuneTask& task);

  // Writes the inputs of run() to context.BundleOf(block), to be called again from there
  // (host/run/tune_bundle.h).
  absl::Status SaveCall(const LoadedMethod& method, const RunContext& context,
                        const TuneTask& task);

 private:
  CallSettings Settings(const LoadedMethod& method, const std::string& stage, const char* function,
                        const TuneTask& task);
  nlohmann::json Words(const LoadedMethod& method, const RunContext& context, const char* function,
                       const TuneTask& task) const;
  absl::Status TakeTuned(PluginCall& call, const TuneTask& task, TuneOutcome* outcome);

  Backend& backend_;
  LastWords* words_;
  EventSink sink_;
  std::string config_file_;
  PluginLog log_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_TUNE_RUNNER_H_
