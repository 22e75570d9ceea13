#include "host/run/transform_work.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "core/base/clock.h"
#include "core/base/status.h"
#include "host/run/fingerprint.h"
#include "host/run/preservation.h"

namespace quantmill {
namespace {

constexpr int64_t kCheckedRows = 128;  // of calibration text,
constexpr int64_t kMadeUpRows = 32;    // or without any

// Hidden states for a block without calibration text: uniform in [-1, 1), the same every time.
absl::StatusOr<Tensor> MadeUpInput(int64_t hidden_size) {
  QM_ASSIGN_OR_RETURN(Tensor input, Tensor::Host(DType::kF32, {kMadeUpRows, hidden_size}));
  uint64_t state = 1;
  for (int64_t i = 0; i < input.elements(); ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX generator
    input.as<float>()[i] = static_cast<float>(static_cast<double>(state >> 11) * 0x1p-52 - 1.0);
  }
  return input;
}

bool Concerns(const BlockEdit& edit, const std::vector<ScaleSite>& sites, const std::string& slot) {
  if (!edit.preserves()) return edit.target == slot || absl::StartsWith(edit.target, slot + ".");
  const auto site = std::find_if(sites.begin(), sites.end(),
                                 [&](const ScaleSite& s) { return s.id == edit.target; });
  return site->producer == slot ||
         std::any_of(site->consumers.begin(), site->consumers.end(),
                     [&](const SiteConsumer& consumer) { return consumer.name == slot; });
}

}  // namespace

absl::StatusOr<Tensor> TransformWorker::SampleInput(const TransformWork& work) {
  if (work.calibration == nullptr) {
    QM_ASSIGN_OR_RETURN(const Tensor input, MadeUpInput(in_.plan->config.hidden_size));
    return in_.backend->ToDevice(input);
  }
  QM_ASSIGN_OR_RETURN(const Tensor window, work.calibration->Input(0, false));
  const Tensor rows = window.Rows(0, std::min(kCheckedRows, window.dim(0)));
  QM_ASSIGN_OR_RETURN(Tensor input, in_.backend->Allocate(DType::kF32, rows.shape()));
  QM_RETURN_IF_ERROR(in_.backend->Copy(rows, &input));
  return input;
}

absl::Status TransformWorker::Check(const TransformWork& work, const std::vector<BlockEdit>& edits,
                                    std::set<std::string>* changed) {
  const TransformBlock& block = BlockOf(work);
  const BlockEditor& editor = *work.state->editor();
  for (const BlockEdit& edit : edits) {
    QM_RETURN_IF_ERROR(editor.Check(edit));
    const bool offered = std::any_of(block.sites.begin(), block.sites.end(),
                                     [&](const ScaleSite& site) { return site.id == edit.target; });
    const std::string module = edit.kind == EditKind::kReplace
                                   ? edit.target.substr(0, edit.target.rfind('.'))
                                   : edit.target;
    const std::vector<LinearSlot> slots = BlockSlots(in_.plan->config, block.block);
    const auto named = [&](const LinearSlot& slot) { return slot.name == module; };
    const bool foreign = std::any_of(slots.begin(), slots.end(), named) &&
                         std::none_of(block.slots.begin(), block.slots.end(), named);
    if (edit.preserves() ? !offered : foreign) {
      return absl::InvalidArgumentError(
          absl::StrCat("edit '", std::string(EditName(edit.kind)), "' of ", edit.target,
                       ": it reaches linears that the stage's layers do not name"));
    }
  }
  BlockWeights trial = work.state->dense();
  for (const BlockEdit& edit : edits) {
    QM_RETURN_IF_ERROR(editor.Apply(edit, &trial, changed).status());
  }
  QM_ASSIGN_OR_RETURN(const Tensor input, SampleInput(work));
  return CheckPreserved(in_.plan->config, block.block, editor, work.state->dense(), edits, input,
                        *in_.backend);
}

absl::StatusOr<std::vector<BlockEdit>> TransformWorker::Propose(const TransformWork& work,
                                                                TransformOutcome* outcome) {
  const PlannedStage& stage = *work.stage->stage;
  const PreparedStage::Part& part = work.stage->parts.at(work.state->index());
  for (const CrashRecord& crash : in_.journal->crashes) {
    const auto same = [&](const CrashRecord& other) {
      return other.key == work.keys.attempt && other.Covers(part.block.name);
    };
    if (!same(crash)) continue;
    const auto& crashes = in_.journal->crashes;
    if (std::count_if(crashes.begin(), crashes.end(), same) >= kCallAttempts) {
      return absl::AbortedError(absl::StrCat(crash.how, ", twice; not tried again"));
    }
  }
  TransformTask task;
  task.block = &part.block;
  task.plan = &part.plan;
  task.options = &work.stage->OptionsOf(work.slots[0]);
  task.seed = SlotSeed(in_.plan->pipeline.seed, stage.name, part.block.name);
  task.stats_from_original = work.single_original_stream;
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
  std::optional<BlockTrials> trials;
  if (work.calibration != nullptr) {
    const bool original = work.stage->uses_original_stream && !work.single_original_stream &&
                          !work.stage->uses_quantized_stream;
    trials.emplace(
        *in_.backend, in_.plan->config, part.block.block, work.state->dense(),
        work.calibration->windows(),
        [&work, original](int64_t window) { return work.calibration->Input(window, original); },
        kTrialCacheBytes);
    task.trials = &*trials;
  }
  *outcome = runner_.Run(work.stage->method.loaded, stage.name, work.keys.attempt, task);
  QM_RETURN_IF_ERROR(outcome->status);
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
  const PlannedStage& stage = *work.stage->stage;
  TransformOutcome outcome;
  TransformResult result;
  absl::StatusOr<std::vector<BlockEdit>> edits = Propose(work, &outcome);
  absl::Status failure = edits.status();
  if (failure.ok()) {
    failure =
        WithContext(Check(work, *edits, &result.changed),
                    absl::StrCat("stage ", stage.name, ", plugin ",
                                 work.stage->method.loaded.method->id, ", ", BlockOf(work).name));
  }
  const double seconds = SecondsSince(start);
  if (failure.ok()) {
    result.edits = *std::move(edits);
    result.records = Records(work, outcome, result.edits, seconds, "");
    return result;
  }
  // A damaged checkpoint is nothing a method could be excused for.
  if (IsDeviceLost(failure) || absl::IsDataLoss(failure) ||
      stage.on_error.action == OnError::Action::kStop)
    return failure;
  in_.sink({{"type", "log"},
            {"severity", 2},
            {"text", absl::StrCat(failure.message(), "; ", BlockOf(work).name,
                                  " stays as it was (on_error)")}});
  result.changed.clear();
  result.records = Records(work, outcome, {}, seconds, std::string(failure.message()));
  return result;
}

}  // namespace quantmill
