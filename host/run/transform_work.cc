#include "host/run/transform_work.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "core/base/clock.h"
#include "core/base/status.h"
#include "host/plugins/rule_note.h"
#include "host/run/edit_check.h"
#include "host/run/fingerprint.h"

namespace quantmill {
namespace {

bool Concerns(const BlockEdit& edit, const std::vector<ScaleSite>& sites, const std::string& slot) {
  if (!edit.preserves()) return edit.target == slot || absl::StartsWith(edit.target, slot + ".");
  const auto site = std::find_if(sites.begin(), sites.end(),
                                 [&](const ScaleSite& s) { return s.id == edit.target; });
  return site->producer == slot ||
         std::any_of(site->consumers.begin(), site->consumers.end(),
                     [&](const SiteConsumer& consumer) { return consumer.name == slot; });
}

}  // namespace

absl::Status TransformWorker::Check(const TransformWork& work, const std::vector<BlockEdit>& edits,
                                    std::set<std::string>* changed) {
  Tensor window;
  if (work.calibration != nullptr) {
    QM_ASSIGN_OR_RETURN(window, work.calibration->Input(0, false));
  }
  QM_ASSIGN_OR_RETURN(const Tensor input,
                      CheckedInput(work.calibration == nullptr ? nullptr : &window,
                                   in_.plan->config.hidden_size, *in_.backend));
  return CheckEdits(in_.plan->config, BlockOf(work), *work.state->editor(), work.state->dense(),
                    edits, input, *in_.backend, changed);
}

int TransformWorker::Crashes(const TransformWork& work, std::string* how) const {
  int count = 0;
  for (const CrashRecord& crash : in_.journal->crashes) {
    if (crash.key != work.keys.attempt || !crash.Covers(BlockOf(work).name)) continue;
    ++count;
    *how = crash.how;
  }
  return count;
}

RunContext TransformWorker::ContextFor(const TransformWork& work) const {
  RunContext context;
  context.stage = work.stage->stage->name;
  context.key = work.keys.attempt;
  context.crash_dir = absl::StrCat(in_.work_dir, "/crash/", work.keys.attempt);
  return context;
}

absl::Status TransformWorker::Prepare(const TransformWork& work, PreparedCall* call) {
  const PlannedStage& stage = *work.stage->stage;
  const PreparedStage::Part& part = work.stage->parts.at(work.state->index());
  TransformTask& task = call->task;
  task.block = &part.block;
  task.plan = &part.plan;
  task.options = &work.stage->OptionsOf(work.slots[0]);
  task.seed = SlotSeed(in_.plan->pipeline.seed, stage.name, part.block.name);
  task.stats_from_original = work.single_original_stream;
  task.config = &in_.plan->config;
  task.dense = &work.state->dense();
  if (!part.plan.stats.empty()) task.stats = &work.state->statistics();
  for (const LinearSlot& slot : part.block.slots) {
    const Tensor& dense = work.state->dense().At(slot)->dense;
    Tensor weight = dense;
    if (dense.dtype() != DType::kF32) {
      QM_ASSIGN_OR_RETURN(weight, in_.backend->Allocate(DType::kF32, dense.shape()));
      QM_RETURN_IF_ERROR(in_.backend->Copy(dense, &weight));
    }
    QM_RETURN_IF_ERROR(CheckFinite(weight, slot.name, *in_.backend));
    task.weights.push_back(std::move(weight));
  }
  if (work.calibration == nullptr) return absl::OkStatus();
  const bool original = work.stage->uses_original_stream && !work.single_original_stream &&
                        !work.stage->uses_quantized_stream;
  task.windows = work.calibration->windows();
  task.inputs = [&work, original](int64_t window) {
    return work.calibration->Input(window, original);
  };
  call->trials.emplace(*in_.backend, in_.plan->config, part.block.block, *task.dense, task.windows,
                       task.inputs, kTrialCacheBytes);
  task.trials = &*call->trials;
  return absl::OkStatus();
}

absl::StatusOr<std::vector<BlockEdit>> TransformWorker::Propose(const TransformWork& work,
                                                                const RunContext& context,
                                                                const TransformTask& task,
                                                                TransformOutcome* outcome,
                                                                std::set<std::string>* changed) {
  const LoadedMethod& method = work.stage->method.loaded;
  *outcome = runner_.Run(method, context, task);
  QM_RETURN_IF_ERROR(outcome->status);
  QM_RETURN_IF_ERROR(
      BreaksRule(WithContext(Check(work, outcome->edits, changed),
                             absl::StrCat("stage ", context.stage, ", plugin ", method.method->id,
                                          ", ", BlockOf(work).name)),
                 kEditRule));
  return std::move(outcome->edits);
}

std::vector<SlotRecord> TransformWorker::Records(const TransformWork& work,
                                                 const TransformOutcome& outcome,
                                                 const std::vector<BlockEdit>& edits,
                                                 double seconds, const std::string& error) const {
  std::vector<SlotRecord> records;
  const TransformBlock& block = BlockOf(work);
  const BoundMethod& method = work.stage->method;
  const auto& stats = work.stage->parts.at(work.state->index()).plan.stats;
  for (const LinearSlot& slot : block.slots) {
    SlotRecord r;
    if (!stats.empty()) {
      r.rows = work.state->statistics().RowCount(
          slot.input_group, stats[0].request.from_original && !work.single_original_stream);
    }
    r.slot = slot.name;
    r.transformed = true;
    r.method = method.loaded.method->id;
    r.version = method.loaded.method->version;
    r.plugin_sha256 = method.plugin_sha256;
    r.options = OptionsJson(work.stage->OptionsOf(work.slots[0]));
    r.seed = SlotSeed(in_.plan->pipeline.seed, work.stage->stage->name, block.name);
    r.error = error;
    r.out_features = slot.out_features;
    r.in_features = slot.in_features;
    for (const BlockEdit& edit : edits) {
      if (!Concerns(edit, work.state->editor()->sites(), slot.name)) continue;
      r.edits.push_back(absl::StrCat(std::string(EditName(edit.kind)), " ", edit.target));
    }
    r.seconds = seconds / static_cast<double>(block.slots.size());
    r.scratch_peak_bytes = static_cast<int64_t>(outcome.scratch_peak);
    records.push_back(std::move(r));
  }
  return records;
}

absl::StatusOr<TransformResult> TransformWorker::Run(const TransformWork& work) {
  const auto start = Clock::now();
  RunContext context = ContextFor(work);
  const std::string bundle = context.BundleOf(BlockOf(work).name);
  std::string how;
  const int crashes = Crashes(work, &how);
  context.bundle = crashes > 0;
  TransformOutcome outcome;
  TransformResult result;
  if (crashes >= kCallAttempts) {
    return HandleFailure(work, absl::AbortedError(absl::StrCat(how, ", twice; not tried again")),
                         bundle, outcome, SecondsSince(start));
  }
  PreparedCall call;
  QM_RETURN_IF_ERROR(Prepare(work, &call));
  absl::StatusOr<std::vector<BlockEdit>> edits =
      Propose(work, context, call.task, &outcome, &result.changed);
  if (edits.ok()) {
    std::error_code error;
    if (context.bundle) std::filesystem::remove_all(bundle, error);
    result.edits = *std::move(edits);
    result.records = Records(work, outcome, result.edits, SecondsSince(start), "");
    return result;
  }
  if (IsDeviceLost(edits.status())) return edits.status();
  // The bundle is a help for the plugin's author; the failure matters more than its own.
  if (failure_bundles_++ < kMostFailureBundles) {
    runner_.SaveCall(work.stage->method.loaded, context, call.task).IgnoreError();
  }
  return HandleFailure(work, edits.status(), bundle, outcome, SecondsSince(start));
}

absl::StatusOr<TransformResult> TransformWorker::HandleFailure(const TransformWork& work,
                                                               const absl::Status& failure,
                                                               const std::string& bundle,
                                                               const TransformOutcome& outcome,
                                                               double seconds) {
  const PlannedStage& stage = *work.stage->stage;
  const std::string text = absl::StrCat(failure.message(), ReplayHint(bundle));
  // A damaged checkpoint is nothing a method could be excused for.
  if (absl::IsDataLoss(failure) || stage.on_error.action == OnError::Action::kStop) {
    return absl::Status(failure.code(), text);
  }
  in_.sink({{"type", "log"},
            {"severity", 2},
            {"text", absl::StrCat(text, "; ", BlockOf(work).name, " stays as it was (on_error)")}});
  TransformResult result;
  result.records = Records(work, outcome, {}, seconds, std::string(failure.message()));
  return result;
}

}  // namespace quantmill
