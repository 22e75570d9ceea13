#include "host/trial/replay_call.h"

#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "host/trial/worker_call.h"
#include "host/worker/plugin_log.h"

namespace quantmill {
namespace {

// What the plan asks for, out of the bundle. The plugin may have been built anew since: a plan()
// that asks for more than the failed call was given cannot be served.
absl::StatusOr<Statistics> StatisticsFor(const CrashBundle& bundle, const SlotPlan& plan,
                                         Backend& backend) {
  Statistics statistics;
  for (const SlotPlan::Stat& stat : plan.stats) {
    const std::string_view id = StatId(stat.request.kind);
    statistics.SetRowCount(bundle.slot.input_group, stat.request.from_original, bundle.row_count);
    bool found = false;
    for (const NamedTensor& named : bundle.statistics) {
      if (named.name != id) continue;
      QM_ASSIGN_OR_RETURN(Tensor value, backend.ToDevice(named.tensor));
      statistics.Set(stat.request, std::move(value));
      found = true;
    }
    if (found || stat.optional) continue;
    return absl::FailedPreconditionError(
        ErrorText(absl::StrCat("plan() asks for the statistic '", AbslView(id), "'"),
                  "the failed call did not have it", "run the pipeline again"));
  }
  return statistics;
}

absl::StatusOr<TrialResult> CallOnBlock(const CrashBundle& bundle, const ReplayRequest& request,
                                        TrialSession& session) {
  TransformTrial call;
  call.stage = bundle.stage;
  call.block = bundle.block.get();
  call.options = request.options;
  call.seed = bundle.seed;
  if (!bundle.plans()) {
    return bundle.tunes() ? session.CallTuning(call) : session.CallTransform(call);
  }
  QM_RETURN_IF_ERROR(bundle.tunes() ? session.PlanTuning(call).status()
                                    : session.PlanTransform(call).status());
  return TrialResult();
}

absl::StatusOr<TrialResult> CallOfTraining(const CrashBundle& bundle, const ReplayRequest& request,
                                           TrialSession& session) {
  ReparamTrial call;
  call.stage = bundle.stage;
  call.call = bundle.reparam.get();
  call.options = request.options;
  call.seed = bundle.seed;
  return session.CallReparam(call);
}

// What the run computed in.
DType ActivationsOf(const CrashBundle& bundle) {
  if (bundle.block != nullptr) return bundle.block->activation_dtype;
  return bundle.reparam == nullptr ? DType::kF32 : bundle.reparam->activation_dtype;
}

absl::StatusOr<TrialResult> Call(const CrashBundle& bundle, const ReplayRequest& request,
                                 TrialSession& session) {
  if (bundle.block != nullptr) return CallOnBlock(bundle, request, session);
  if (bundle.reparam != nullptr) return CallOfTraining(bundle, request, session);
  TrialCall call;
  call.stage = bundle.stage;
  call.slot = bundle.slot;
  call.options = request.options;
  call.seed = bundle.seed;
  call.weight_dtype = bundle.weight_dtype;
  call.scale_dtype = bundle.scale_dtype;
  call.weight = bundle.weight;
  call.statistics = [&](const SlotPlan& plan) {
    return StatisticsFor(bundle, plan, session.backend());
  };
  if (!bundle.plans()) return session.Call(call);
  QM_RETURN_IF_ERROR(session.Plan(call).status());
  return TrialResult();
}

absl::StatusOr<ReplayResult> Replay(const ReplayRequest& request, const EventSink& sink) {
  QM_ASSIGN_OR_RETURN(const CrashBundle bundle, ReadCrashBundle(request.directory));
  QM_ASSIGN_OR_RETURN(const std::unique_ptr<TrialSession> session,
                      TrialSession::Open(request.setup, sink, ActivationsOf(bundle)));
  const absl::StatusOr<TrialResult> result = Call(bundle, request, *session);
  if (IsDeviceLost(result.status())) return result.status();
  ReplayResult replay;
  replay.outcome = result.ok() ? "succeeded" : "failed";
  if (result.ok()) replay.result = *result;
  if (!result.ok()) replay.text = std::string(result.status().message());
  return replay;
}

nlohmann::json ToJson(const ReplayRequest& request) {
  return {{"mode", kReplayMode},
          {"directory", request.directory},
          {"setup", ToJson(request.setup)},
          {"options", request.options}};
}

}  // namespace

absl::StatusOr<ReplayResult> ReplayInWorker(ReplayRequest request, double hang_seconds) {
  QM_ASSIGN_OR_RETURN(const WorkerCallEnd end, CallInWorker(
                                                   [&request](const std::string& last_words) {
                                                     request.setup.last_words = last_words;
                                                     return ToJson(request);
                                                   },
                                                   hang_seconds, [](const nlohmann::json&) {}));
  ReplayResult replay;
  if (end.lost) {
    replay.outcome = end.hung ? "hung" : "crashed";
    replay.text = end.text;
    return replay;
  }
  QM_RETURN_IF_ERROR(end.status);
  replay.outcome = end.value.value("outcome", "");
  replay.text = end.value.value("text", "");
  replay.result = TrialResultFromJson(end.value.value("result", nlohmann::ordered_json::object()));
  return replay;
}

absl::StatusOr<ReplayResult> ReplayInProcess(const ReplayRequest& request) {
  absl::StatusOr<ReplayResult> replay = Replay(request, [](const nlohmann::json& event) {
    PrintWarning(event.value("severity", 0), event.value("text", ""));
  });
  if (!IsDeviceLost(replay.status())) return replay;
  return ReplayResult{"crashed", std::string(replay.status().message()), {}};
}

absl::StatusOr<nlohmann::ordered_json> RunReplayTask(const nlohmann::json& json,
                                                     const EventSink& sink) {
  ReplayRequest request;
  request.directory = json.value("directory", "");
  request.setup = TrialSetupFromJson(json.value("setup", nlohmann::json::object()));
  request.options = json.value("options", ResolvedOptions());
  QM_ASSIGN_OR_RETURN(const ReplayResult replay, Replay(request, sink));
  return nlohmann::ordered_json{
      {"outcome", replay.outcome}, {"text", replay.text}, {"result", ToJson(replay.result)}};
}

}  // namespace quantmill
