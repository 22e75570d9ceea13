#include "host/trial/session.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/clock.h"
#include "core/base/status.h"
#include "core/calib/block_trials.h"
#include "core/formats/distortion.h"
#include "host/plugins/catalog.h"
#include "host/plugins/rule_note.h"
#include "host/run/backend.h"
#include "host/run/edit_check.h"
#include "host/run/transform_work.h"
#include "host/run/tune_parts.h"
#include "host/run/unit_source.h"

namespace quantmill {
namespace {

// A call that takes longer than this in all is timed once.
constexpr double kTimedSeconds = 0.2;
constexpr int kMostTimedCalls = 3;

// The method, and everything that may know its format.
std::vector<std::string> MethodsToLoad(const Catalog& catalog, const std::string& method) {
  std::set<std::string> ids = {method};
  for (const PluginInfo& plugin : catalog.plugins) {
    if (!plugin.rejected.empty()) continue;
    for (const MethodInfo& other : plugin.methods) {
      if (other.Has(QM_EXT_FORMAT) || other.Has(QM_EXT_LINEAR_KERNEL)) ids.insert(other.id);
    }
  }
  return {ids.begin(), ids.end()};
}

absl::StatusOr<Tensor> HostCopy(const Tensor& tensor, Backend& backend) {
  if (tensor.device().is_cpu()) return tensor;
  QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(tensor.dtype(), tensor.shape()));
  QM_RETURN_IF_ERROR(backend.Copy(tensor, &host));
  return host;
}

}  // namespace

nlohmann::json ToJson(const TrialSetup& setup) {
  return {{"plugins", setup.plugins},
          {"method", setup.method},
          {"device", setup.device},
          {"last_words", setup.last_words}};
}

TrialSetup TrialSetupFromJson(const nlohmann::json& json) {
  return {json.value("plugins", std::vector<std::string>()), json.value("method", ""),
          json.value("device", "cpu"), json.value("last_words", "")};
}

nlohmann::ordered_json ToJson(const TrialResult& result) {
  if (result.not_finite >= 0) {
    return {{"not_finite", result.not_finite}, {"seconds", result.seconds}};
  }
  if (result.tuned >= 0) {
    return {{"tuned", result.tuned},
            {"edits", result.edits},
            {"loss_before", result.loss_before},
            {"loss_after", result.loss_after},
            {"seconds", result.seconds},
            {"scratch_bytes", result.scratch_bytes}};
  }
  if (result.edits >= 0) {
    return {{"edits", result.edits},
            {"seconds", result.seconds},
            {"scratch_bytes", result.scratch_bytes}};
  }
  nlohmann::ordered_json json = {{"format", result.format_id},
                                 {"bits_per_weight", result.bits_per_weight},
                                 {"weight_nmse", result.weight_nmse}};
  if (result.output_nmse >= 0) json["output_nmse"] = result.output_nmse;
  json["seconds"] = result.seconds;
  json["scratch_bytes"] = result.scratch_bytes;
  return json;
}

TrialResult TrialResultFromJson(const nlohmann::ordered_json& json) {
  TrialResult result;
  result.format_id = json.value("format", "");
  result.bits_per_weight = json.value("bits_per_weight", 0.0);
  result.weight_nmse = json.value("weight_nmse", 0.0);
  result.output_nmse = json.value("output_nmse", -1.0);
  result.seconds = json.value("seconds", 0.0);
  result.scratch_bytes = json.value("scratch_bytes", uint64_t{0});
  result.edits = json.value("edits", int64_t{-1});
  result.tuned = json.value("tuned", int64_t{-1});
  result.not_finite = json.value("not_finite", int64_t{-1});
  result.loss_before = json.value("loss_before", 0.0);
  result.loss_after = json.value("loss_after", 0.0);
  return result;
}

absl::StatusOr<std::unique_ptr<TrialSession>> TrialSession::Open(const TrialSetup& setup,
                                                                 const EventSink& sink,
                                                                 DType activations) {
  std::unique_ptr<TrialSession> session(new TrialSession());
  QM_ASSIGN_OR_RETURN(const Catalog catalog, DiscoverPlugins(setup.plugins));
  QM_RETURN_IF_ERROR(CheckNamedPlugins(catalog, setup.plugins));
  QM_ASSIGN_OR_RETURN(session->backend_, MakeBackend(setup.device, activations));
  QM_ASSIGN_OR_RETURN(session->host_, MakeCpuBackend());
  QM_ASSIGN_OR_RETURN(const std::vector<LoadedMethod> methods,
                      LoadMethods(catalog, MethodsToLoad(catalog, setup.method)));
  for (const LoadedMethod& loaded : methods) {
    if (setup.method == loaded.method->id) session->method_ = loaded;
  }
  session->formats_ = std::make_unique<PluginFormats>(methods, *session->host_);
  if (!setup.last_words.empty()) {
    QM_ASSIGN_OR_RETURN(session->words_, LastWords::Open(setup.last_words));
  }
  session->format_words_ = std::make_unique<FormatWords>(session->words_.get());
  session->formats_->Watch(session->format_words_.get());
  session->runner_ =
      std::make_unique<MethodRunner>(*session->backend_, session->words_.get(), sink);
  session->transforms_ =
      std::make_unique<TransformRunner>(*session->backend_, session->words_.get(), sink, "");
  session->tuning_ =
      std::make_unique<TuneRunner>(*session->backend_, session->words_.get(), sink, "");
  session->training_ =
      std::make_unique<ReparamCalls>(*session->backend_, session->words_.get(), sink);
  return session;
}

absl::StatusOr<SlotPlan> TrialSession::Plan(const TrialCall& call) {
  return runner_->Plan(method_, call.stage, call.slot, call.options, call.weight_dtype,
                       call.scale_dtype);
}

absl::StatusOr<SlotOutcome> TrialSession::RunOnce(const SlotTask& task, const std::string& stage) {
  RunContext context;
  context.stage = stage;
  SlotOutcome outcome = std::move(runner_->Run(method_, context, {&task, 1})[0]);
  QM_RETURN_IF_ERROR(outcome.status);
  return outcome;
}

absl::Status TrialSession::Judge(const TrialCall& call, const PackedWeight& packed,
                                 TrialResult* result) {
  const FormatWordsScope scope(
      format_words_.get(),
      {{"slot", call.slot.name},
       {"shape", absl::StrCat("[", call.slot.out_features, "x", call.slot.in_features, "]")}});
  QM_RETURN_IF_ERROR(BreaksRule(formats_->Check(packed), "QM-P-010"));
  QM_ASSIGN_OR_RETURN(const Tensor dequantized,
                      DequantizeOn(*backend_, *formats_, packed, DType::kF32));
  QM_ASSIGN_OR_RETURN(const Tensor approximate, HostCopy(dequantized, *backend_));
  QM_ASSIGN_OR_RETURN(const Distortion distortion, MeasureDistortion(call.weight, approximate));
  if (!distortion.finite) {
    return BreaksRule(
        absl::InternalError("the packed weight dequantizes to values that are not finite"),
        "QM-C-001");
  }
  result->weight_nmse = distortion.nmse();
  if (call.output_error) {
    QM_ASSIGN_OR_RETURN(result->output_nmse, call.output_error(approximate));
  }
  return absl::OkStatus();
}

absl::StatusOr<TrialResult> TrialSession::Call(const TrialCall& call) {
  QM_ASSIGN_OR_RETURN(const SlotPlan plan, Plan(call));
  QM_ASSIGN_OR_RETURN(const Statistics statistics, call.statistics(plan));
  SlotTask task;
  task.slot = &call.slot;
  task.options = &call.options;
  task.plan = &plan;
  task.weight_dtype = call.weight_dtype;
  task.scale_dtype = call.scale_dtype;
  task.stats = plan.stats.empty() ? nullptr : &statistics;
  task.seed = call.seed;
  QM_ASSIGN_OR_RETURN(task.weight, backend_->ToDevice(call.weight));
  QM_ASSIGN_OR_RETURN(SlotOutcome outcome, RunOnce(task, call.stage));
  TrialResult result;
  result.seconds = outcome.seconds;
  double total = outcome.seconds;
  for (int calls = 1; call.timed && calls < kMostTimedCalls && total < kTimedSeconds; ++calls) {
    QM_ASSIGN_OR_RETURN(outcome, RunOnce(task, call.stage));
    result.seconds = std::min(result.seconds, outcome.seconds);
    total += outcome.seconds;
  }
  result.format_id = outcome.packed.format_id;
  result.bits_per_weight = outcome.packed.BitsPerWeight();
  result.scratch_bytes = outcome.scratch_peak;
  QM_RETURN_IF_ERROR(WithContext(Judge(call, outcome.packed, &result),
                                 absl::StrCat("plugin ", method_.method->id, ", result of run()")));
  return result;
}

absl::StatusOr<TransformPlan> TrialSession::PlanTransform(const TransformTrial& call) {
  return transforms_->Plan(method_, call.stage, call.block->block, call.options);
}

absl::Status TrialSession::CheckProposed(const TransformTrial& call, const BlockWeights& weights,
                                         const std::vector<BlockEdit>& edits) {
  const BundledBlock& bundle = *call.block;
  const BlockEditor editor(bundle.config, bundle.block.block, weights, *backend_);
  const Tensor* window = bundle.windows.empty() ? nullptr : &bundle.windows[0];
  QM_ASSIGN_OR_RETURN(const Tensor input,
                      CheckedInput(window, bundle.config.hidden_size, *backend_));
  std::set<std::string> changed;
  return CheckEdits(bundle.config, bundle.block, editor, weights, edits, input, *backend_,
                    &changed);
}

absl::StatusOr<TrialResult> TrialSession::CallTransform(const TransformTrial& call) {
  const BundledBlock& bundle = *call.block;
  QM_ASSIGN_OR_RETURN(const TransformPlan plan, PlanTransform(call));
  QM_ASSIGN_OR_RETURN(const Statistics statistics, bundle.StatisticsFor(plan, *backend_));
  QM_ASSIGN_OR_RETURN(BlockWeights weights, bundle.Load(*backend_));
  TransformTask task;
  task.block = &bundle.block;
  task.plan = &plan;
  task.options = &call.options;
  task.seed = call.seed;
  task.config = &bundle.config;
  task.dense = &weights;
  if (!plan.stats.empty()) task.stats = &statistics;
  for (const LinearSlot& slot : bundle.block.slots) {
    const Tensor& dense = weights.At(slot)->dense;
    QM_ASSIGN_OR_RETURN(Tensor weight, backend_->Allocate(DType::kF32, dense.shape()));
    QM_RETURN_IF_ERROR(backend_->Copy(dense, &weight));
    task.weights.push_back(std::move(weight));
  }
  std::unique_ptr<BlockTrials> trials;
  if (!bundle.windows.empty()) {
    task.windows = static_cast<int64_t>(bundle.windows.size());
    task.inputs = [this, &bundle](int64_t window) {
      return backend_->ToDevice(bundle.windows[static_cast<size_t>(window)]);
    };
    trials = std::make_unique<BlockTrials>(*backend_, bundle.config, bundle.block.block, weights,
                                           task.windows, task.inputs, kTrialCacheBytes);
    task.trials = trials.get();
  }
  RunContext context;
  context.stage = call.stage;
  const auto start = Clock::now();
  TransformOutcome outcome = transforms_->Run(method_, context, task);
  TrialResult result;
  result.seconds = SecondsSince(start);
  QM_RETURN_IF_ERROR(outcome.status);
  result.scratch_bytes = outcome.scratch_peak;
  result.edits = static_cast<int64_t>(outcome.edits.size());
  QM_RETURN_IF_ERROR(
      BreaksRule(WithContext(CheckProposed(call, weights, outcome.edits),
                             absl::StrCat("plugin ", method_.method->id, ", result of run()")),
                 kEditRule));
  return result;
}

absl::StatusOr<TunePlan> TrialSession::PlanTuning(const TransformTrial& call) {
  QM_ASSIGN_OR_RETURN(const std::optional<TunePlan> plan,
                      tuning_->Plan(method_, call.stage, call.block->block, call.options));
  if (plan) return *plan;
  return absl::FailedPreconditionError("plan() wants no tuning with these options");
}

absl::StatusOr<TrialResult> TrialSession::CallTuning(const TransformTrial& call) {
  const BundledBlock& bundle = *call.block;
  QM_ASSIGN_OR_RETURN(const TunePlan plan, PlanTuning(call));
  QM_ASSIGN_OR_RETURN(const BlockWeights weights, bundle.Load(*backend_));
  TuneTask task;
  task.block = &bundle.block;
  task.plan = &plan;
  task.options = &call.options;
  task.seed = call.seed;
  QM_RETURN_IF_ERROR(AddDenseParts(bundle.config, weights, *backend_, &task));
  task.packed = bundle.packed;
  for (PackedWeight& packed : task.packed) {
    for (NamedTensor& named : packed.tensors) {
      QM_ASSIGN_OR_RETURN(named.tensor, backend_->ToDevice(named.tensor));
    }
  }
  BlockTrials trials(
      *backend_, bundle.config, bundle.block.block, weights,
      static_cast<int64_t>(bundle.windows.size()),
      [&](int64_t window) {
        return backend_->ToDevice(bundle.windows[static_cast<size_t>(window)]);
      },
      kTrialCacheBytes);
  task.trials = &trials;
  RunContext context;
  context.stage = call.stage;
  const auto start = Clock::now();
  const TuneOutcome outcome = tuning_->Run(method_, context, task);
  TrialResult result;
  result.seconds = SecondsSince(start);
  QM_RETURN_IF_ERROR(outcome.status);
  const BlockEditor editor(bundle.config, bundle.block.block, weights, *backend_);
  std::set<std::string> changed;
  QM_RETURN_IF_ERROR(
      WithContext(CheckTuned(bundle.config, editor, weights, *formats_, task, outcome, &changed),
                  absl::StrCat("plugin ", method_.method->id, ", result of run()")));
  QM_ASSIGN_OR_RETURN(const TuneComparison comparison,
                      CompareTuned(*backend_, *formats_, task, outcome));
  result.scratch_bytes = outcome.scratch_peak;
  result.edits = static_cast<int64_t>(outcome.edits.size());
  result.tuned = std::count_if(outcome.tuned.begin(), outcome.tuned.end(),
                               [](const auto& tuned) { return tuned.has_value(); });
  result.loss_before = comparison.loss_before;
  result.loss_after = comparison.loss_after;
  return result;
}

}  // namespace quantmill
