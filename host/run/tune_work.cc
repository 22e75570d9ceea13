#include "host/run/tune_work.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/clock.h"
#include "core/base/status.h"
#include "host/run/fingerprint.h"
#include "host/run/transform_work.h"
#include "host/run/tune_parts.h"
#include "host/run/unit_source.h"

namespace quantmill {
namespace {

// What the stage's own method packed; a fallback's slots are of another format.
const PackedWeight* PackedByStage(const TuneWork& work, const std::string& slot) {
  const auto& records = work.packed->slots;
  const auto record = std::find_if(records.begin(), records.end(),
                                   [&](const SlotRecord& r) { return r.slot == slot; });
  if (record == records.end() || record->method != work.stage->method.loaded.method->id) {
    return nullptr;
  }
  const auto found = work.packed->packed.find(slot);
  return found == work.packed->packed.end() ? nullptr : found->second.get();
}

}  // namespace

int TuneWorker::Crashes(const TuneWork& work, std::string* how) const {
  int count = 0;
  for (const CrashRecord& crash : in_.journal->crashes) {
    if (crash.key != work.keys.attempt || !crash.Covers(BlockOf(work).name)) continue;
    ++count;
    *how = crash.how;
  }
  return count;
}

RunContext TuneWorker::ContextFor(const TuneWork& work) const {
  RunContext context;
  context.stage = work.stage->stage->name;
  context.key = work.keys.attempt;
  context.crash_dir = absl::StrCat(in_.work_dir, "/crash/", work.keys.attempt);
  return context;
}

absl::StatusOr<TuneTask> TuneWorker::MakeTask(const TuneWork& work, BlockTrials* trials) {
  const PreparedStage::Part& part = work.stage->parts.at(work.state->index());
  TuneTask task;
  task.block = &part.block;
  task.plan = &part.tuning;
  task.options = &work.stage->OptionsOf(work.slots[0]);
  task.seed = SlotSeed(in_.plan->pipeline.seed, work.stage->stage->name, part.block.name);
  task.trials = trials;
  task.config = &in_.plan->config;
  task.dense = &work.state->dense();
  task.windows = work.calibration->windows();
  task.inputs = [&work](int64_t window) { return work.calibration->Input(window, false); };
  QM_RETURN_IF_ERROR(AddDenseParts(in_.plan->config, *task.dense, *in_.backend, &task));
  for (const LinearSlot& slot : part.block.slots) {
    PackedWeight& packed = task.packed.emplace_back();
    if (const PackedWeight* made = PackedByStage(work, slot.name); made != nullptr) packed = *made;
    for (NamedTensor& named : packed.tensors) {
      QM_ASSIGN_OR_RETURN(named.tensor, in_.backend->ToDevice(named.tensor));
    }
  }
  return task;
}

absl::Status TuneWorker::Attempt(const TuneWork& work, TuneOutcome* outcome,
                                 TuneComparison* comparison, TuneResult* result) {
  const PreparedStage::Part& part = work.stage->parts.at(work.state->index());
  const LoadedMethod& method = work.stage->method.loaded;
  RunContext context = ContextFor(work);
  const std::string bundle = context.BundleOf(part.block.name);
  std::string how;
  const int crashes = Crashes(work, &how);
  if (crashes >= kCallAttempts) {
    return absl::AbortedError(absl::StrCat(how, ", twice; not tried again", ReplayHint(bundle)));
  }
  context.bundle = crashes > 0;
  BlockTrials trials(
      *in_.backend, in_.plan->config, part.block.block, work.state->dense(),
      work.calibration->windows(),
      [&work](int64_t window) { return work.calibration->Input(window, false); }, kTrialCacheBytes);
  QM_ASSIGN_OR_RETURN(const TuneTask task, MakeTask(work, &trials));
  *outcome = runner_.Run(method, context, task);
  absl::Status status = Judge(work, task, *outcome, comparison, result);
  if (status.ok()) {
    std::error_code error;
    if (context.bundle) std::filesystem::remove_all(bundle, error);
    return status;
  }
  if (IsDeviceLost(status)) return status;
  // The bundle is a help for the plugin's author; the failure matters more than its own.
  if (failure_bundles_++ < kMostFailureBundles) {
    runner_.SaveCall(method, context, task).IgnoreError();
  }
  return absl::Status(status.code(), absl::StrCat(status.message(), ReplayHint(bundle)));
}

absl::Status TuneWorker::Judge(const TuneWork& work, const TuneTask& task,
                               const TuneOutcome& outcome, TuneComparison* comparison,
                               TuneResult* result) {
  QM_RETURN_IF_ERROR(outcome.status);
  const std::string context =
      absl::StrCat("stage ", work.stage->stage->name, ", plugin ",
                   work.stage->method.loaded.method->id, ", ", task.block->name);
  QM_RETURN_IF_ERROR(
      WithContext(CheckTuned(in_.plan->config, *work.state->editor(), work.state->dense(),
                             *in_.formats, task, outcome, &result->changed),
                  context));
  QM_ASSIGN_OR_RETURN(*comparison, CompareTuned(*in_.backend, *in_.formats, task, outcome));
  return absl::OkStatus();
}

void TuneWorker::AddRecords(const TuneWork& work, const TuneOutcome& outcome,
                            const TuneComparison& comparison, double seconds,
                            const std::string& error, TuneResult* result) const {
  const std::vector<LinearSlot>& slots = BlockOf(work).slots;
  for (size_t i = 0; i < slots.size(); ++i) {
    const auto& made = work.packed->slots;
    const auto packed = std::find_if(made.begin(), made.end(),
                                     [&](const SlotRecord& r) { return r.slot == slots[i].name; });
    if (packed == made.end() || PackedByStage(work, slots[i].name) == nullptr) continue;
    SlotRecord r = *packed;
    r.tuned = true;
    r.packed = result->packed.contains(r.slot);
    r.error = error;
    r.seed = SlotSeed(in_.plan->pipeline.seed, work.stage->stage->name, BlockOf(work).name);
    if (r.packed) r.weight_nmse = comparison.weight_nmse[i];
    r.output_nmse = -1;
    r.loss_before = comparison.loss_before;
    r.loss_after = comparison.loss_after;
    r.seconds = seconds / static_cast<double>(slots.size());
    r.scratch_peak_bytes = static_cast<int64_t>(outcome.scratch_peak);
    result->records.push_back(std::move(r));
  }
}

absl::StatusOr<TuneResult> TuneWorker::Run(const TuneWork& work) {
  const auto start = Clock::now();
  const PlannedStage& stage = *work.stage->stage;
  const std::string& block = BlockOf(work).name;
  TuneOutcome outcome;
  TuneComparison comparison;
  TuneResult result;
  const std::vector<LinearSlot>& slots = BlockOf(work).slots;
  const bool any = std::any_of(slots.begin(), slots.end(), [&](const LinearSlot& slot) {
    return PackedByStage(work, slot.name) != nullptr;
  });
  if (!any) return result;  // on_error left nothing to tune
  const absl::Status failure = Attempt(work, &outcome, &comparison, &result);
  std::string error;
  if (!failure.ok()) {
    if (IsDeviceLost(failure) || absl::IsDataLoss(failure) ||
        stage.on_error.action == OnError::Action::kStop) {
      return failure;
    }
    error = absl::StrCat(failure.message());
  } else if (!comparison.better()) {
    error = absl::StrCat("tuning made the block worse: mean squared error ", comparison.loss_after,
                         " after ", comparison.loss_before);
  }
  if (error.empty()) {
    for (size_t i = 0; i < outcome.tuned.size(); ++i) {
      if (!outcome.tuned[i]) continue;
      result.packed[slots[i].name] = std::make_shared<PackedWeight>(*std::move(outcome.tuned[i]));
    }
    result.edits = std::move(outcome.edits);
  } else {
    in_.sink({{"type", "log"},
              {"severity", 2},
              {"text", absl::StrCat(error, "; ", block, " stays as it was packed")}});
    result.changed.clear();
  }
  AddRecords(work, outcome, comparison, SecondsSince(start), error, &result);
  return result;
}

}  // namespace quantmill
