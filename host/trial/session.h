// One call of a plugin outside of a run: what `try` and `replay` make. Loads plugins into this
// process.
#ifndef QUANTMILL_HOST_TRIAL_SESSION_H_
#define QUANTMILL_HOST_TRIAL_SESSION_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "core/calib/statistics.h"
#include "core/tensor/backend.h"
#include "host/plugins/registry.h"
#include "host/run/format_words.h"
#include "host/run/method_runner.h"
#include "host/run/train/reparam_bundle.h"
#include "host/run/train/reparam_calls.h"
#include "host/run/transform_bundle.h"
#include "host/run/transform_runner.h"
#include "host/run/tune_runner.h"
#include "host/supervisor/last_words.h"
#include "host/supervisor/process.h"
#include "host/worker/formats.h"
#include "nlohmann/json.hpp"

namespace quantmill {

struct TrialSetup {
  std::vector<std::string> plugins;  // files, before those on the search path
  std::string method;
  std::string device;      // auto, cpu, cuda, cuda:N
  std::string last_words;  // file of the mapped record; empty = none
};
nlohmann::json ToJson(const TrialSetup& setup);
TrialSetup TrialSetupFromJson(const nlohmann::json& json);

// What plan() and run() are given.
struct TrialCall {
  std::string stage;
  LinearSlot slot;
  ResolvedOptions options;
  uint64_t seed = 0;
  DType weight_dtype = DType::kF32, scale_dtype = DType::kF16;
  Tensor weight;  // F32 [out, in] on the host
  // The statistics a plan asks for, on the session's backend.
  std::function<absl::StatusOr<Statistics>(const SlotPlan& plan)> statistics;
  // Of a dequantized weight on the host; may be null.
  std::function<absl::StatusOr<double>(const Tensor& approximate)> output_error;
  bool timed = false;  // repeat a fast call: `seconds` is that of the fastest
};

struct TrialResult {
  std::string format_id;
  double bits_per_weight = 0;  // as stored
  double weight_nmse = 0;      // sum (W - A)^2 / sum W^2
  double output_nmse = -1;     // as TrialCall::output_error says; -1 = not measured
  double seconds = 0;          // of run()
  uint64_t scratch_bytes = 0;  // the most that run() held
  int64_t edits = -1;          // of a transform, which has none of bits, errors and format
  // Of a tuning, which has edits, too: linears that were tuned, and the error of the block.
  int64_t tuned = -1;
  double loss_before = 0, loss_after = 0;
  // Of a training's call, which has nothing but this: values of its results that are NaN or
  // infinite.
  int64_t not_finite = -1;
};

// A call of a transform or a tuning out of its bundle.
struct TransformTrial {
  std::string stage;
  const BundledBlock* block = nullptr;
  ResolvedOptions options;
  uint64_t seed = 0;
};

// A call of a training out of its bundle.
struct ReparamTrial {
  std::string stage;
  const BundledReparam* call = nullptr;
  ResolvedOptions options;
  uint64_t seed = 0;
};

// Also part of what the commands write with --json.
nlohmann::ordered_json ToJson(const TrialResult& result);
TrialResult TrialResultFromJson(const nlohmann::ordered_json& json);

class TrialSession {
 public:
  // `activations`: the dtype a block is run in.
  static absl::StatusOr<std::unique_ptr<TrialSession>> Open(const TrialSetup& setup,
                                                            const EventSink& sink,
                                                            DType activations = DType::kF32);

  Backend& backend() { return *backend_; }
  Backend& host() { return *host_; }
  const LoadedMethod& method() const { return method_; }

  absl::StatusOr<SlotPlan> Plan(const TrialCall& call);
  // plan(), run(), and what a run does with the result: the format's checks, dequantizing, errors.
  absl::StatusOr<TrialResult> Call(const TrialCall& call);
  absl::StatusOr<TransformPlan> PlanTransform(const TransformTrial& call);
  // plan(), run(), and a run's checks of the edits.
  absl::StatusOr<TrialResult> CallTransform(const TransformTrial& call);
  // FAILED_PRECONDITION: these options want no tuning.
  absl::StatusOr<TunePlan> PlanTuning(const TransformTrial& call);
  // plan(), run(), a run's checks, and the block's error before and after.
  absl::StatusOr<TrialResult> CallTuning(const TransformTrial& call);
  // plan() and, unless that was the call, the function.
  absl::StatusOr<TrialResult> CallReparam(const ReparamTrial& call);

 private:
  TrialSession() = default;
  absl::Status CheckProposed(const TransformTrial& call, const BlockWeights& weights,
                             const std::vector<BlockEdit>& edits);
  absl::StatusOr<SlotOutcome> RunOnce(const SlotTask& task, const std::string& stage);
  absl::Status Judge(const TrialCall& call, const PackedWeight& packed, TrialResult* result);

  std::unique_ptr<Backend> backend_, host_;
  LoadedMethod method_;
  std::unique_ptr<PluginFormats> formats_;
  std::unique_ptr<LastWords> words_;
  std::unique_ptr<FormatWords> format_words_;
  std::unique_ptr<MethodRunner> runner_;
  std::unique_ptr<TransformRunner> transforms_;
  std::unique_ptr<TuneRunner> tuning_;
  std::unique_ptr<ReparamCalls> training_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_TRIAL_SESSION_H_
