#include "host/run/method_runner.h"

#include <chrono>
#include <filesystem>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/safetensors_writer.h"
#include "host/worker/invoke.h"

namespace quantmill {
namespace {

constexpr uint64_t kScratchSlack = 64 << 10;  // for the small arrays a result is described with

std::string ShapeText(const SlotTask& task) {
  return absl::StrCat("[", task.slot->out_features, "x", task.slot->in_features, " f32]");
}

// The views handed to the plugin for one slot, with the memory they point into.
class InfoView {
 public:
  InfoView(const LinearSlot& slot, DType weight_dtype, DType scale_dtype) : info_{} {
    info_.struct_size = sizeof(info_);
    info_.name = slot.name.c_str();
    info_.role = slot.role.c_str();
    info_.out_features = slot.out_features;
    info_.in_features = slot.in_features;
    info_.weight_dtype = static_cast<qm_dtype>(weight_dtype);
    info_.input_group = slot.input_group;
    info_.scale_dtype = static_cast<qm_dtype>(scale_dtype);
  }
  const qm_linear_info* get() const { return &info_; }

 private:
  qm_linear_info info_;
};

StatRequest AsCollected(StatRequest request, bool single_original_stream) {
  if (single_original_stream) request.from_original = false;
  return request;
}

class StatsView {
 public:
  explicit StatsView(const SlotTask& task) : stats_{} {
    stats_.struct_size = sizeof(stats_);
    bool from_original = false;
    for (const SlotPlan::Stat& stat : task.plan->stats) {
      const StatRequest request = AsCollected(stat.request, task.stats_from_original);
      const Tensor* tensor = task.stats == nullptr ? nullptr : task.stats->Find(request);
      if (tensor == nullptr) continue;
      from_original = request.from_original;
      names_.push_back(std::make_unique<std::string>(StatId(request.kind)));
      items_.push_back({names_.back()->c_str(), tensor->View()});
      items_.back().tensor.flags |= QM_TENSOR_READONLY;
    }
    stats_.items = items_.data();
    stats_.count = items_.size();
    stats_.row_count =
        task.stats == nullptr ? 0 : task.stats->RowCount(task.slot->input_group, from_original);
  }
  const qm_stats* get() const { return &stats_; }
  const std::vector<qm_named_tensor>& items() const { return items_; }

 private:
  std::vector<std::unique_ptr<std::string>> names_;
  std::vector<qm_named_tensor> items_;
  qm_stats stats_;
};

qm_tensor ReadOnlyView(const Tensor& tensor) {
  qm_tensor view = tensor.View();
  view.flags |= QM_TENSOR_READONLY;
  return view;
}

double SecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Marks the last words for as long as it lives.
class CallMark {
 public:
  CallMark(LastWords* words, const nlohmann::json& text) : words_(words) {
    if (words_ != nullptr) words_->Begin(text);
  }
  ~CallMark() {
    if (words_ != nullptr) words_->End();
  }
  CallMark(const CallMark&) = delete;
  CallMark& operator=(const CallMark&) = delete;

 private:
  LastWords* words_;
};

absl::StatusOr<SlotPlan::Stat> ReadStat(const qm_stat_request& request, int input_group) {
  if (request.stat_id == nullptr) return absl::InvalidArgumentError("a statistic without a name");
  SlotPlan::Stat stat;
  stat.optional = (request.flags & QM_STAT_OPTIONAL) != 0;
  QM_ASSIGN_OR_RETURN(stat.request.kind, StatKindFromId(request.stat_id));
  stat.request.input_group = input_group;
  stat.request.max_rows = request.max_rows;
  stat.request.from_original = (request.flags & QM_STAT_FROM_ORIGINAL) != 0;
  if (request.dtype != QM_F32) {
    return absl::InvalidArgumentError(
        absl::StrCat("statistic '", request.stat_id, "' in a dtype other than f32"));
  }
  return stat;
}

}  // namespace

CallSettings MethodRunner::Settings(const LoadedMethod& method, const std::string& stage,
                                    const std::string& function, const std::string& slot,
                                    const ResolvedOptions& options, uint64_t seed) {
  CallSettings settings;
  settings.what = absl::StrCat("stage ", stage, ", plugin ", method.method->id, " ",
                               method.method->version, ", ", function, ", ", slot);
  settings.options = &options;
  settings.seed = seed;
  settings.progress = [words = words_](double) {
    if (words != nullptr) words->Beat();
    return false;
  };
  settings.service = [words = words_](bool entered) {
    if (words == nullptr) return;
    entered ? words->EnterService() : words->LeaveService();
  };
  settings.log = [this, what = settings.what](int32_t severity, const std::string& text) {
    log_.Line(what, severity, text);
  };
  return settings;
}

nlohmann::json MethodRunner::Words(const LoadedMethod& method, const RunContext& context,
                                   const std::string& function,
                                   absl::Span<const SlotTask> tasks) const {
  nlohmann::json slots = nlohmann::json::array();
  for (const SlotTask& task : tasks) slots.push_back(task.slot->name);
  return {{"plugin", method.method->id},
          {"version", method.method->version},
          {"path", method.path},
          {"function", function},
          {"stage", context.stage},
          {"key", context.key},
          {"slot", tasks[0].slot->name},
          {"shape", ShapeText(tasks[0])},
          {"slots", slots},
          {"seed", tasks[0].seed},
          {"options", *tasks[0].options}};
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
  RunContext context;
  context.stage = stage;
  const CallMark mark(words_, Words(method, context, "quantize-linear.plan", {&task, 1}));
  CallSettings settings =
      Settings(method, stage, "quantize-linear.plan", slot.name, options, /*seed=*/0);
  const std::string what = settings.what;
  PluginCall call(backend_, std::move(settings));
  const InfoView info(slot, weight_dtype, scale_dtype);
  qm_quant_plan out = {};
  out.struct_size = sizeof(out);
  QM_RETURN_IF_ERROR(Invoke(call, table->plan, info.get(), &out));
  if (out.stat_count > 0 && out.stats == nullptr) {
    return absl::InternalError(absl::StrCat(what, ": statistics counted but not listed"));
  }
  SlotPlan plan;
  for (uint64_t i = 0; i < out.stat_count; ++i) {
    const absl::StatusOr<SlotPlan::Stat> stat = ReadStat(out.stats[i], slot.input_group);
    if (stat.ok()) {
      plan.stats.push_back(*stat);
    } else if ((out.stats[i].flags & QM_STAT_OPTIONAL) == 0) {
      return WithContext(stat.status(), what);
    }
  }
  plan.scratch_bytes = out.scratch_bytes;
  plan.scratch_bytes_shared = out.scratch_bytes_shared;
  plan.format_id = out.format_id == nullptr ? "" : out.format_id;
  plan.flops = out.flops;
  return plan;
}

absl::StatusOr<PackedWeight> MethodRunner::ToHost(PackedWeight packed, const SlotTask& task,
                                                  const std::string& what) {
  if (packed.out_features != task.slot->out_features ||
      packed.in_features != task.slot->in_features) {
    return absl::InternalError(absl::StrCat(what, ": the result is [", packed.out_features, ", ",
                                            packed.in_features, "], the slot ", ShapeText(task)));
  }
  if (packed.format_id != task.plan->format_id) {
    return absl::InternalError(absl::StrCat(what, ": plan() said ", task.plan->format_id,
                                            ", the result is ", packed.format_id));
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
  const nlohmann::json words = Words(method, context, "quantize-linear.run", {&task, 1});
  if (context.bundle) {
    outcome.status = WriteCrashBundle(absl::StrCat(context.crash_dir, "/", task.slot->name),
                                      backend_, words, task);
    if (!outcome.status.ok()) return outcome;
  }
  const auto start = std::chrono::steady_clock::now();
  CallSettings settings = Settings(method, context.stage, "quantize-linear.run", task.slot->name,
                                   *task.options, task.seed);
  const std::string what = settings.what;
  if (task.plan->scratch_bytes > 0) {
    settings.scratch_limit = task.plan->scratch_bytes + kScratchSlack;
  }
  PluginCall call(backend_, std::move(settings));
  const InfoView info(*task.slot, task.weight_dtype, task.scale_dtype);
  const StatsView stats(task);
  const qm_tensor weight = ReadOnlyView(task.weight);
  qm_packed packed = {};
  {
    const CallMark mark(words_, words);
    outcome.status = Invoke(call, table->run, info.get(), &weight, stats.get(), &packed);
  }
  outcome.scratch_peak = call.scratch_peak_bytes();
  outcome.seconds = SecondsSince(start);
  if (!outcome.status.ok()) return outcome;
  absl::StatusOr<PackedWeight> result = call.TakePacked(packed);
  if (result.ok()) result = ToHost(*std::move(result), task, what);
  outcome.status = result.status();
  if (result.ok()) outcome.packed = *std::move(result);
  return outcome;
}

std::vector<SlotOutcome> MethodRunner::RunGroup(const LoadedMethod& method,
                                                const RunContext& context,
                                                absl::Span<const SlotTask> tasks) {
  const auto* table = method.Ext<qm_quantize_linear>(QM_EXT_QUANTIZE_LINEAR);
  const auto start = std::chrono::steady_clock::now();
  const std::string names = absl::StrJoin(tasks, " + ", [](std::string* out, const SlotTask& task) {
    absl::StrAppend(out, task.slot->name);
  });
  CallSettings settings = Settings(method, context.stage, "quantize-linear.run_group", names,
                                   *tasks[0].options, tasks[0].seed);
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

  std::vector<std::unique_ptr<InfoView>> infos;
  std::vector<std::unique_ptr<StatsView>> stats;
  std::vector<const qm_linear_info*> info_pointers;
  std::vector<const qm_stats*> stats_pointers;
  std::vector<qm_tensor> weights;
  for (const SlotTask& task : tasks) {
    infos.push_back(std::make_unique<InfoView>(*task.slot, task.weight_dtype, task.scale_dtype));
    stats.push_back(std::make_unique<StatsView>(task));
    info_pointers.push_back(infos.back()->get());
    stats_pointers.push_back(stats.back()->get());
    weights.push_back(ReadOnlyView(task.weight));
  }
  std::vector<qm_packed> packed(tasks.size());
  absl::Status status;
  {
    const CallMark mark(words_, Words(method, context, "quantize-linear.run_group", tasks));
    status = Invoke(call, table->run_group, tasks.size(), info_pointers.data(), weights.data(),
                    stats_pointers.data(), packed.data());
  }
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
    if (!failed) return outcomes;
    // One bad linear fails a whole group call; alone, the others get their result.
  }
  std::vector<SlotOutcome> outcomes;
  for (const SlotTask& task : tasks) outcomes.push_back(RunOne(method, context, task));
  return outcomes;
}

absl::Status WriteCrashBundle(const std::string& directory, Backend& backend,
                              const nlohmann::json& words, const SlotTask& task) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) return SystemError("create", directory, error.value());
  auto write = [&](const std::string& file, const std::vector<NamedTensor>& tensors) {
    std::vector<TensorDeclaration> declarations;
    for (const NamedTensor& t : tensors) {
      declarations.push_back({t.name, t.tensor.dtype(), t.tensor.shape()});
    }
    absl::StatusOr<std::unique_ptr<SafetensorsWriter>> writer =
        SafetensorsWriter::Create(absl::StrCat(directory, "/", file), declarations);
    if (!writer.ok()) return writer.status();
    for (const NamedTensor& t : tensors) {
      QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(t.tensor.dtype(), t.tensor.shape()));
      QM_RETURN_IF_ERROR(backend.Copy(t.tensor, &host));
      QM_RETURN_IF_ERROR((*writer)->Write(t.name, host));
    }
    return (*writer)->Finish();
  };
  QM_RETURN_IF_ERROR(write("weight.safetensors", {{"weight", task.weight}}));
  std::vector<NamedTensor> stats;
  int64_t rows = 0;
  for (const SlotPlan::Stat& stat : task.plan->stats) {
    const StatRequest request = AsCollected(stat.request, task.stats_from_original);
    const Tensor* tensor = task.stats == nullptr ? nullptr : task.stats->Find(request);
    if (tensor != nullptr) stats.push_back({std::string(StatId(request.kind)), *tensor});
    if (task.stats != nullptr) {
      rows = task.stats->RowCount(task.slot->input_group, request.from_original);
    }
  }
  if (!stats.empty()) QM_RETURN_IF_ERROR(write("statistics.safetensors", stats));
  nlohmann::ordered_json call = {{"plugin", words.at("plugin")},
                                 {"version", words.at("version")},
                                 {"path", words.at("path")},
                                 {"function", words.at("function")},
                                 {"stage", words.at("stage")},
                                 {"slot", task.slot->name},
                                 {"role", task.slot->role},
                                 {"out_features", task.slot->out_features},
                                 {"in_features", task.slot->in_features},
                                 {"input_group", task.slot->input_group},
                                 {"weight_dtype", std::string(DTypeName(task.weight_dtype))},
                                 {"scale_dtype", std::string(DTypeName(task.scale_dtype))},
                                 {"row_count", rows},
                                 {"device", DeviceName(backend.device())},
                                 {"scratch_bytes", task.plan->scratch_bytes},
                                 {"format_id", task.plan->format_id},
                                 {"seed", task.seed},
                                 {"options", *task.options}};
  return WriteFile(directory + "/call.json", call.dump(1) + "\n");
}

}  // namespace quantmill
