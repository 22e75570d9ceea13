#include "host/run/slot_work.h"

#include <atomic>
#include <cmath>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/formats/activations.h"
#include "core/formats/distortion.h"
#include "core/io/files.h"
#include "core/threads/thread_pool.h"
#include "host/plugins/rule_note.h"
#include "host/run/fingerprint.h"
#include "host/run/unit_source.h"

namespace quantmill {
namespace {

absl::StatusOr<Tensor> HostCopy(const Tensor& tensor, Backend& backend) {
  if (tensor.device().is_cpu()) return tensor;
  QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(tensor.dtype(), tensor.shape()));
  QM_RETURN_IF_ERROR(backend.Copy(tensor, &host));
  return host;
}

}  // namespace

std::string ReplayHint(const std::string& bundle) {
  if (!FileExists(bundle + "/call.json")) return "";
  return absl::StrCat("; repeat the call with: quantmill replay ", bundle);
}

absl::Status CheckFinite(const Tensor& weight, const std::string& slot, Backend& backend) {
  QM_ASSIGN_OR_RETURN(const Tensor host, HostCopy(weight, backend));
  const float* values = host.as<const float>();
  std::atomic<int64_t> bad = -1;
  backend.threads().ParallelFor(host.elements(), 1 << 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      if (!std::isfinite(values[i])) {
        bad.store(i, std::memory_order_relaxed);
        return;
      }
    }
  });
  if (bad < 0) return absl::OkStatus();
  return absl::DataLossError(ErrorText(
      absl::StrCat("tensor ", slot, ".weight has a value that is ",
                   std::isnan(values[bad]) ? "not a number" : "infinite", " at row ",
                   bad / weight.dim(1), ", column ", bad % weight.dim(1)),
      "quantizing it would write garbage", "fetch the checkpoint again, or leave the layer out"));
}

const LinearSlot& SlotWorker::SlotOf(const GroupWork& work, size_t index) const {
  return in_.plan->slots[static_cast<size_t>(work.stage->stage->slots[work.slots[index]])];
}

void SlotWorker::Warn(const std::string& text) const {
  in_.sink({{"type", "log"}, {"severity", 2}, {"text", text}});
}

int SlotWorker::Crashes(const std::string& attempt, const std::string& slot,
                        std::string* how) const {
  int count = 0;
  for (const CrashRecord& crash : in_.journal->crashes) {
    if (crash.key != attempt || !crash.Covers(slot)) continue;
    ++count;
    *how = crash.how;
  }
  return count;
}

RunContext SlotWorker::ContextFor(const GroupWork& work) const {
  RunContext context;
  context.stage = work.stage->stage->name;
  context.key = work.keys.attempt;
  context.crash_dir = absl::StrCat(in_.work_dir, "/crash/", work.keys.attempt);
  for (const CrashRecord& crash : in_.journal->crashes) {
    if (crash.key == work.keys.attempt) context.one_by_one = true;
  }
  return context;
}

absl::StatusOr<SlotTask> SlotWorker::MakeTask(const GroupWork& work, size_t index,
                                              const BoundMethod& method,
                                              const ResolvedOptions& options) {
  const LinearSlot& slot = SlotOf(work, index);
  SlotTask task;
  task.slot = &slot;
  task.options = &options;
  task.plan = &method.plans[work.slots[index]];
  task.weight_dtype =
      in_.stages->weight_dtypes[static_cast<size_t>(work.stage->stage->slots[work.slots[index]])];
  task.scale_dtype = in_.stages->scale_dtype;
  task.stats = work.stats;
  task.stats_from_original = work.stats_from_original;
  task.seed = SlotSeed(in_.plan->pipeline.seed, work.stage->stage->name, slot.name);
  QM_ASSIGN_OR_RETURN(task.weight, in_.backend->Allocate(DType::kF32, work.dense[index].shape()));
  QM_RETURN_IF_ERROR(in_.backend->Copy(work.dense[index], &task.weight));
  QM_RETURN_IF_ERROR(CheckFinite(task.weight, slot.name, *in_.backend));
  return task;
}

std::vector<std::vector<size_t>> SlotWorker::EqualOptions(const GroupWork& work) const {
  std::vector<std::vector<size_t>> parts;
  for (size_t i = 0; i < work.slots.size(); ++i) {
    const ResolvedOptions& options = work.stage->OptionsOf(work.slots[i]);
    bool placed = false;
    for (std::vector<size_t>& part : parts) {
      if (work.stage->OptionsOf(work.slots[part[0]]) != options) continue;
      part.push_back(i);
      placed = true;
      break;
    }
    if (!placed) parts.push_back({i});
  }
  return parts;
}

absl::StatusOr<double> SlotWorker::OutputError(const GroupWork& work, const SlotTask& task,
                                               const LinearWeight& packed, int64_t* rows) {
  StatRequest request;
  request.input_group = task.slot->input_group;
  request.kind = StatKind::kRows;
  request.max_rows = kOutputSampleRows;
  request.from_original = !task.plan->stats.empty() && task.plan->stats[0].request.from_original &&
                          !work.stats_from_original;
  *rows = work.stats->RowCount(request.input_group, request.from_original);
  const Tensor* x = work.stats->Find(request);
  if (x == nullptr || x->dim(0) == 0) return -1.0;
  const Shape shape({x->dim(0), task.slot->out_features});
  Tensor outputs[2];
  for (int i = 0; i < 2; ++i) {
    QM_ASSIGN_OR_RETURN(Tensor y, in_.backend->Allocate(DType::kF32, shape));
    if (i == 1 && packed.kernel != nullptr) {
      QM_RETURN_IF_ERROR(packed.kernel->MatMul(*packed.packed, *x, &y));
    } else {
      const Tensor& weight = i == 0 ? task.weight : packed.dense;
      QM_RETURN_IF_ERROR(
          in_.backend->Gemm(false, true, 1.0, x->View(), weight.View(), 0.0, y.View()));
    }
    QM_ASSIGN_OR_RETURN(outputs[i], HostCopy(y, *in_.backend));
  }
  QM_ASSIGN_OR_RETURN(const Distortion distortion, MeasureDistortion(outputs[0], outputs[1]));
  return distortion.nmse();
}

absl::Status SlotWorker::MeasureErrors(const GroupWork& work, const SlotTask& task,
                                       const PackedWeight& packed, SlotRecord* record) {
  QM_ASSIGN_OR_RETURN(const Tensor dequantized,
                      DequantizeOn(*in_.backend, *in_.formats, packed, DType::kF32));
  QM_ASSIGN_OR_RETURN(const Tensor reference, HostCopy(task.weight, *in_.backend));
  QM_ASSIGN_OR_RETURN(const Tensor approximate, HostCopy(dequantized, *in_.backend));
  QM_ASSIGN_OR_RETURN(const Distortion distortion, MeasureDistortion(reference, approximate));
  if (!distortion.finite) {
    return BreaksRule(
        absl::InternalError("the packed weight dequantizes to values that are not finite"),
        "QM-C-001");
  }
  record->weight_nmse = distortion.nmse();
  if (work.stats == nullptr || task.plan->stats.empty()) return absl::OkStatus();
  LinearWeight weight;
  if (ActivationsOf(packed.format_json) != Activations::kFloat) {
    QM_RETURN_IF_ERROR(PutPacked(*in_.backend, *in_.formats, packed, &weight));
  }
  weight.dense = dequantized;
  QM_ASSIGN_OR_RETURN(record->output_nmse, OutputError(work, task, weight, &record->rows));
  return absl::OkStatus();
}

nlohmann::json SlotWorker::PurposeOf(const GroupWork& work, const LinearSlot& slot) const {
  nlohmann::json purpose = {
      {"stage", work.stage->stage->name},
      {"slot", slot.name},
      {"shape", absl::StrCat("[", slot.out_features, "x", slot.in_features, "]")},
      {"key", work.keys.attempt}};
  const std::string bundle = ContextFor(work).BundleOf(slot.name);
  if (!ReplayHint(bundle).empty()) purpose["bundle"] = bundle;
  return purpose;
}

absl::StatusOr<SlotResult> SlotWorker::Accept(const GroupWork& work, size_t index,
                                              const BoundMethod& method,
                                              const ResolvedOptions& options, const SlotTask& task,
                                              SlotOutcome outcome) {
  const LinearSlot& slot = SlotOf(work, index);
  auto context = [&](const absl::Status& status) {
    return WithContext(status, absl::StrCat("stage ", work.stage->stage->name, ", plugin ",
                                            method.loaded.method->id, ", ", slot.name));
  };
  SlotResult result;
  auto packed = std::make_shared<PackedWeight>(std::move(outcome.packed));
  SlotRecord& r = result.record;
  r.slot = slot.name;
  r.packed = true;
  r.method = method.loaded.method->id;
  r.version = method.loaded.method->version;
  r.plugin_sha256 = method.plugin_sha256;
  r.options = OptionsJson(options);
  r.seed = task.seed;
  r.format_id = packed->format_id;
  r.format_json = packed->format_json;
  r.out_features = packed->out_features;
  r.in_features = packed->in_features;
  r.bits_per_weight = packed->BitsPerWeight();
  r.seconds = outcome.seconds;
  r.scratch_peak_bytes = static_cast<int64_t>(outcome.scratch_peak);
  const FormatWordsScope scope(in_.format_words, PurposeOf(work, slot));
  QM_RETURN_IF_ERROR(BreaksRule(context(in_.formats->Check(*packed)), "QM-P-010"));
  const std::string& target = in_.plan->pipeline.export_format;
  if (target != "quantmill" && target != "dense") {
    QM_RETURN_IF_ERROR(context(in_.formats->CanStore(target, packed->format_id, packed->format_json,
                                                     packed->out_features, packed->in_features)));
  }
  QM_RETURN_IF_ERROR(context(MeasureErrors(work, task, *packed, &r)));
  result.packed = std::move(packed);
  return result;
}

absl::StatusOr<SlotResult> SlotWorker::HandleFailure(const GroupWork& work, size_t index,
                                                     const absl::Status& failure,
                                                     const std::string& bundle) {
  if (in_.backend->device().is_cuda()) {
    if (const absl::Status status = in_.backend->Synchronize(); !status.ok()) {
      return DeviceLost(failure);
    }
  }
  const PlannedStage& stage = *work.stage->stage;
  const LinearSlot& slot = SlotOf(work, index);
  const std::string text = absl::StrCat(failure.message(), ReplayHint(bundle));
  if (stage.on_error.action == OnError::Action::kStop) {
    return absl::Status(failure.code(), text);
  }
  if (stage.on_error.action == OnError::Action::kKeepDense) {
    Warn(absl::StrCat(text, "; ", slot.name, " stays dense (on_error: keep-dense)"));
    SlotResult result;
    result.record.slot = slot.name;
    result.record.error = std::string(failure.message());
    result.record.out_features = slot.out_features;
    result.record.in_features = slot.in_features;
    return result;
  }
  const BoundMethod& method = *work.stage->fallback;
  Warn(absl::StrCat(text, "; ", slot.name, " goes to ", method.loaded.method->id,
                    " (on_error: use)"));
  QM_ASSIGN_OR_RETURN(const SlotTask task, MakeTask(work, index, method, stage.fallback_options));
  // No second try for this one: its inputs are written beforehand where a crash is to be expected.
  RunContext context = ContextFor(work);
  context.crash_dir += "/fallback";
  std::string how;
  context.bundle = Crashes(context.key, slot.name, &how) > 0;
  std::vector<SlotOutcome> outcomes = in_.runner->Run(method.loaded, context, {&task, 1});
  QM_RETURN_IF_ERROR(outcomes[0].status);
  std::error_code error;
  if (context.bundle) std::filesystem::remove_all(context.crash_dir, error);
  QM_ASSIGN_OR_RETURN(SlotResult result, Accept(work, index, method, stage.fallback_options, task,
                                                std::move(outcomes[0])));
  result.record.error = std::string(failure.message());
  return result;
}

std::vector<SlotOutcome> SlotWorker::Call(const GroupWork& work, const RunContext& context,
                                          absl::Span<const SlotTask> tasks) {
  const LoadedMethod& method = work.stage->method.loaded;
  if (!context.one_by_one || tasks.empty()) return in_.runner->Run(method, context, tasks);
  std::vector<SlotOutcome> outcomes;
  for (const SlotTask& task : tasks) {
    RunContext one = context;
    std::string how;
    one.bundle = Crashes(context.key, task.slot->name, &how) > 0;
    outcomes.push_back(std::move(in_.runner->Run(method, one, {&task, 1})[0]));
    if (!IsDeviceLost(outcomes.back().status)) continue;
    outcomes.resize(tasks.size(), outcomes.back());
    break;
  }
  return outcomes;
}

absl::StatusOr<SlotResult> SlotWorker::Finish(const GroupWork& work, const RunContext& context,
                                              size_t index, const ResolvedOptions& options,
                                              const SlotTask& task, SlotOutcome outcome) {
  absl::Status failure = outcome.status;
  if (failure.ok()) {
    absl::StatusOr<SlotResult> result =
        Accept(work, index, work.stage->method, options, task, std::move(outcome));
    if (result.ok()) return result;
    failure = result.status();
  }
  if (IsDeviceLost(failure)) return failure;
  // The bundle is a help for the plugin's author; the failure matters more than its own.
  if (failure_bundles_++ < kMostFailureBundles) {
    in_.runner->SaveCall(work.stage->method.loaded, context, task).IgnoreError();
  }
  return HandleFailure(work, index, failure, context.BundleOf(task.slot->name));
}

absl::StatusOr<std::vector<SlotResult>> SlotWorker::Run(const GroupWork& work) {
  std::vector<SlotResult> results(work.slots.size());
  const RunContext context = ContextFor(work);
  for (const std::vector<size_t>& part : EqualOptions(work)) {
    std::vector<SlotTask> tasks;
    std::vector<size_t> members;
    const ResolvedOptions& options = work.stage->OptionsOf(work.slots[part[0]]);
    for (size_t index : part) {
      const std::string& slot = SlotOf(work, index).name;
      std::string how;
      if (Crashes(context.key, slot, &how) >= kCallAttempts) {
        const absl::Status failure =
            absl::AbortedError(absl::StrCat(how, ", twice; not tried again"));
        QM_ASSIGN_OR_RETURN(results[index],
                            HandleFailure(work, index, failure, context.BundleOf(slot)));
        continue;
      }
      QM_ASSIGN_OR_RETURN(SlotTask task, MakeTask(work, index, work.stage->method, options));
      tasks.push_back(std::move(task));
      members.push_back(index);
    }
    std::vector<SlotOutcome> outcomes = Call(work, context, tasks);
    for (size_t i = 0; i < tasks.size(); ++i) {
      QM_ASSIGN_OR_RETURN(results[members[i]], Finish(work, context, members[i], options, tasks[i],
                                                      std::move(outcomes[i])));
    }
  }
  return results;
}

}  // namespace quantmill
