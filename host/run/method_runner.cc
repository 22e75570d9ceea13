#include "host/run/method_runner.h"

#include <memory>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/base/clock.h"
#include "core/base/status.h"
#include "host/plugins/rule_note.h"
#include "host/run/call_parts.h"
#include "host/run/crash_bundle.h"
#include "host/worker/invoke.h"

namespace quantmill {
namespace {

constexpr char kDeviceLostPayload[] = "quantmill/device-lost";
constexpr char kGroupFunction[] = "quantize-linear.run_group";

std::string ShapeText(const SlotTask& task) {
  return absl::StrCat("[", task.slot->out_features, "x", task.slot->in_features, " f32]");
}

}  // namespace

absl::Status DeviceLost(const absl::Status& cause) {
  absl::Status status =
      absl::UnavailableError(absl::StrCat("the device is lost: ", cause.message()));
  status.SetPayload(kDeviceLostPayload, absl::Cord("1"));
  return status;
}

bool IsDeviceLost(const absl::Status& status) {
  return !status.ok() && status.GetPayload(kDeviceLostPayload).has_value();
}

std::vector<NamedTensor> StatisticsOf(const SlotTask& task, int64_t* row_count) {
  return MeasuredStatistics(task.plan->stats, task.slot->input_group, task.stats,
                            task.stats_from_original, row_count);
}

CallSettings MethodRunner::Settings(const LoadedMethod& method, const std::string& stage,
                                    const std::string& function, const std::string& slot,
                                    const ResolvedOptions& options, uint64_t seed) {
  return SettingsOf(absl::StrCat("stage ", stage, ", plugin ", method.method->id, " ",
                                 method.method->version, ", ", function, ", ", slot),
                    options, seed, words_, &log_);
}

nlohmann::json MethodRunner::Words(const LoadedMethod& method, const RunContext& context,
                                   const std::string& function,
                                   absl::Span<const SlotTask> tasks) const {
  nlohmann::json words = DescribeCall(method, context.stage, function, tasks[0], backend_.device());
  nlohmann::json slots = nlohmann::json::array();
  for (const SlotTask& task : tasks) slots.push_back(task.slot->name);
  words["slots"] = std::move(slots);
  words["shape"] = ShapeText(tasks[0]);
  words["key"] = context.key;
  if (context.bundle) words["bundle"] = context.BundleOf(tasks[0].slot->name);
  return words;
}

absl::StatusOr<SlotPlan> MethodRunner::Plan(const LoadedMethod& method, const std::string& stage,
                                            const LinearSlot& slot, const ResolvedOptions& options,
                                            DType weight_dtype, DType scale_dtype) {
  const auto* table = method.Ext<qm_quantize_linear>(QM_EXT_QUANTIZE_LINEAR);
  if (!QM_HAS(table, plan) || !QM_HAS(table, run)) {
    return absl::FailedPreconditionError(
        absl::StrCat("plugin ", method.method->id, " does not quantize linears"));
  }
  SlotTask task;
  task.slot = &slot;
  task.options = &options;
  task.weight_dtype = weight_dtype;
  task.scale_dtype = scale_dtype;
  RunContext context;
  context.stage = stage;
  const LastWordsMark mark(words_, Words(method, context, kPlanFunction, {&task, 1}));
  CallSettings settings = Settings(method, stage, kPlanFunction, slot.name, options, /*seed=*/0);
  const std::string what = settings.what;
  PluginCall call(backend_, std::move(settings));
  const LinearInfoView info(slot, weight_dtype, scale_dtype);
  qm_quant_plan out = {};
  out.struct_size = sizeof(out);
  QM_RETURN_IF_ERROR(Invoke(call, table->plan, info.get(), &out));
  SlotPlan plan;
  absl::StatusOr<std::vector<SlotPlan::Stat>> stats = ReadStatRequests(out, slot.input_group);
  if (!stats.ok()) return WithContext(stats.status(), what);
  plan.stats = *std::move(stats);
  plan.scratch_bytes = out.scratch_bytes;
  plan.scratch_bytes_shared = out.scratch_bytes_shared;
  plan.format_id = out.format_id == nullptr ? "" : out.format_id;
  plan.format_json = out.format_json == nullptr ? "" : out.format_json;
  plan.bits_per_weight = out.bits_per_weight;
  plan.flops = out.flops;
  return plan;
}

absl::StatusOr<PackedWeight> MethodRunner::ToHost(PackedWeight packed, const SlotTask& task,
                                                  const std::string& what) {
  if (packed.out_features != task.slot->out_features ||
      packed.in_features != task.slot->in_features) {
    return BreaksRule(
        absl::InternalError(absl::StrCat(what, ": the result is [", packed.out_features, ", ",
                                         packed.in_features, "], the slot ", ShapeText(task))),
        "QM-P-010");
  }
  if (packed.format_id != task.plan->format_id) {
    return BreaksRule(absl::InternalError(absl::StrCat(what, ": plan() said ", task.plan->format_id,
                                                       ", the result is ", packed.format_id)),
                      "QM-P-012");
  }
  for (NamedTensor& named : packed.tensors) {
    if (named.tensor.device().is_cpu()) continue;
    QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(named.tensor.dtype(), named.tensor.shape()));
    QM_RETURN_IF_ERROR(backend_.Copy(named.tensor, &host));
    named.tensor = std::move(host);
  }
  return packed;
}

SlotOutcome MethodRunner::RunOne(const LoadedMethod& method, const RunContext& context,
                                 const SlotTask& task) {
  const auto* table = method.Ext<qm_quantize_linear>(QM_EXT_QUANTIZE_LINEAR);
  SlotOutcome outcome;
  const nlohmann::json words = Words(method, context, kRunFunction, {&task, 1});
  if (context.bundle) {
    outcome.status = SaveCall(method, context, task);
    if (!outcome.status.ok()) return outcome;
  }
  const auto start = Clock::now();
  CallSettings settings =
      Settings(method, context.stage, kRunFunction, task.slot->name, *task.options, task.seed);
  const std::string what = settings.what;
  if (task.plan->scratch_bytes > 0) {
    settings.scratch_limit = task.plan->scratch_bytes + kScratchSlack;
  }
  PluginCall call(backend_, std::move(settings));
  const LinearInfoView info(*task.slot, task.weight_dtype, task.scale_dtype);
  const StatisticsView stats(task.plan->stats, task.slot->input_group, task.stats,
                             task.stats_from_original);
  const qm_tensor weight = ReadOnlyView(task.weight);
  qm_packed packed = {};
  LastWordsMark mark(words_, words);
  outcome.status = Invoke(call, table->run, info.get(), &weight, stats.get(), &packed);
  outcome.scratch_peak = call.scratch_peak_bytes();
  outcome.seconds = SecondsSince(start);
  if (!outcome.status.ok()) {
    outcome.status = AfterFailure(outcome.status, backend_, mark);
    return outcome;
  }
  // Still under the mark: what the plugin says of its result may point anywhere.
  absl::StatusOr<PackedWeight> result = call.TakePacked(packed);
  if (result.ok()) result = ToHost(*std::move(result), task, what);
  outcome.status = result.status();
  if (result.ok()) outcome.packed = *std::move(result);
  return outcome;
}

absl::Status MethodRunner::SaveCall(const LoadedMethod& method, const RunContext& context,
                                    const SlotTask& task) {
  return WriteCrashBundle(
      context.BundleOf(task.slot->name), backend_,
      DescribeCall(method, context.stage, kRunFunction, task, backend_.device()), task);
}

std::vector<SlotOutcome> MethodRunner::RunGroup(const LoadedMethod& method,
                                                const RunContext& context,
                                                absl::Span<const SlotTask> tasks) {
  const auto* table = method.Ext<qm_quantize_linear>(QM_EXT_QUANTIZE_LINEAR);
  const auto start = Clock::now();
  const std::string names = absl::StrJoin(tasks, " + ", [](std::string* out, const SlotTask& task) {
    absl::StrAppend(out, task.slot->name);
  });
  CallSettings settings =
      Settings(method, context.stage, kGroupFunction, names, *tasks[0].options, tasks[0].seed);
  const std::string what = settings.what;
  uint64_t limit = tasks[0].plan->scratch_bytes_shared + kScratchSlack;
  bool limited = true;
  for (const SlotTask& task : tasks) {
    limited = limited && task.plan->scratch_bytes > 0;
    limit += task.plan->scratch_bytes -
             std::min(task.plan->scratch_bytes_shared, task.plan->scratch_bytes);
  }
  settings.scratch_limit = limited ? limit : 0;
  PluginCall call(backend_, std::move(settings));

  std::vector<std::unique_ptr<LinearInfoView>> infos;
  std::vector<std::unique_ptr<StatisticsView>> stats;
  std::vector<const qm_linear_info*> info_pointers;
  std::vector<const qm_stats*> stats_pointers;
  std::vector<qm_tensor> weights;
  for (const SlotTask& task : tasks) {
    infos.push_back(
        std::make_unique<LinearInfoView>(*task.slot, task.weight_dtype, task.scale_dtype));
    stats.push_back(std::make_unique<StatisticsView>(task.plan->stats, task.slot->input_group,
                                                     task.stats, task.stats_from_original));
    info_pointers.push_back(infos.back()->get());
    stats_pointers.push_back(stats.back()->get());
    weights.push_back(ReadOnlyView(task.weight));
  }
  std::vector<qm_packed> packed(tasks.size());
  LastWordsMark mark(words_, Words(method, context, kGroupFunction, tasks));
  absl::Status status = Invoke(call, table->run_group, tasks.size(), info_pointers.data(),
                               weights.data(), stats_pointers.data(), packed.data());
  if (!status.ok()) status = AfterFailure(status, backend_, mark);
  std::vector<SlotOutcome> outcomes(tasks.size());
  for (size_t i = 0; i < tasks.size(); ++i) {
    SlotOutcome& outcome = outcomes[i];
    outcome.status = status;
    outcome.scratch_peak = call.scratch_peak_bytes();
    outcome.seconds = SecondsSince(start) / static_cast<double>(tasks.size());
    if (!status.ok()) continue;
    absl::StatusOr<PackedWeight> result = call.TakePacked(packed[i], i);
    if (result.ok()) result = ToHost(*std::move(result), tasks[i], what);
    outcome.status = result.status();
    if (result.ok()) outcome.packed = *std::move(result);
  }
  return outcomes;
}

std::vector<SlotOutcome> MethodRunner::Run(const LoadedMethod& method, const RunContext& context,
                                           absl::Span<const SlotTask> tasks) {
  const auto* table = method.Ext<qm_quantize_linear>(QM_EXT_QUANTIZE_LINEAR);
  if (tasks.size() > 1 && QM_HAS(table, run_group) && !context.one_by_one && !context.bundle) {
    std::vector<SlotOutcome> outcomes = RunGroup(method, context, tasks);
    bool failed = false;
    for (const SlotOutcome& outcome : outcomes) failed = failed || !outcome.status.ok();
    if (!failed || IsDeviceLost(outcomes[0].status)) return outcomes;
    // One bad linear fails a whole group call; alone, the others get their result.
  }
  std::vector<SlotOutcome> outcomes;
  for (const SlotTask& task : tasks) {
    outcomes.push_back(RunOne(method, context, task));
    if (!IsDeviceLost(outcomes.back().status)) continue;
    outcomes.resize(tasks.size(), outcomes.back());
    break;
  }
  return outcomes;
}

}  // namespace quantmill
