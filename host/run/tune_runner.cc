#include "host/run/tune_runner.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "host/run/call_parts.h"
#include "host/run/tune_bundle.h"
#include "host/worker/invoke.h"

namespace quantmill {
namespace {

// The packed weights as the plugin sees them; dense slots have no format, and behind them are the
// other tensors.
class PackedViews {
 public:
  explicit PackedViews(const TuneTask& task) {
    for (size_t i = 0; i < task.packed.size(); ++i) {
      views_.push_back(std::make_unique<PackedView>(task.packed[i]));
      list_.push_back(*views_.back()->get());
      if (!task.packed[i].format_id.empty()) continue;
      list_.back() = {};
      list_.back().out_features = task.block->slots[i].out_features;
      list_.back().in_features = task.block->slots[i].in_features;
    }
    for (const NamedTensor& other : task.others) {
      others_.push_back({other.name.c_str(), ReadOnlyView(other.tensor)});
    }
    list_.push_back({});
    list_.back().tensors = others_.data();
    list_.back().tensor_count = others_.size();
  }
  const qm_packed* get() const { return list_.data(); }

 private:
  std::vector<std::unique_ptr<PackedView>> views_;
  std::vector<qm_packed> list_;
  std::vector<qm_named_tensor> others_;
};

absl::Status CheckReplacement(const NamedTensor& fresh, const Tensor* old) {
  if (old == nullptr) return absl::InternalError("the format has no such tensor");
  if (fresh.tensor.dtype() == old->dtype() && fresh.tensor.shape() == old->shape()) {
    return absl::OkStatus();
  }
  return absl::InternalError(
      absl::StrCat("it is ", AbslView(DTypeName(fresh.tensor.dtype())), " ",
                   fresh.tensor.shape().ToString(), ", the tensor it replaces ",
                   AbslView(DTypeName(old->dtype())), " ", old->shape().ToString()));
}

}  // namespace

TuneRunner::TuneRunner(Backend& backend, LastWords* words, EventSink sink, std::string config_file)
    : backend_(backend),
      words_(words),
      sink_(std::move(sink)),
      config_file_(std::move(config_file)),
      log_([this](int32_t severity, const std::string& text) {
        sink_({{"type", "log"}, {"severity", severity}, {"text", text}});
      }) {}

CallSettings TuneRunner::Settings(const LoadedMethod& method, const std::string& stage,
                                  const char* function, const TuneTask& task) {
  CallSettings settings =
      SettingsOf(absl::StrCat("stage ", stage, ", plugin ", method.method->id, " ",
                              method.method->version, ", ", function, ", ", task.block->name),
                 *task.options, task.seed, words_, &log_);
  settings.block = task.trials;
  return settings;
}

nlohmann::json TuneRunner::Words(const LoadedMethod& method, const RunContext& context,
                                 const char* function, const TuneTask& task) const {
  nlohmann::json words =
      DescribeTuneCall(method, context.stage, function, task, backend_, config_file_);
  words["key"] = context.key;
  words["slots"] = nlohmann::json::array({task.block->name});
  words["shape"] = absl::StrCat("[", task.block->slots.size(), " linears]");
  if (context.bundle) words["bundle"] = context.BundleOf(task.block->name);
  return words;
}

absl::Status TuneRunner::SaveCall(const LoadedMethod& method, const RunContext& context,
                                  const TuneTask& task) {
  return WriteTuneBundle(
      context.BundleOf(task.block->name), backend_,
      DescribeTuneCall(method, context.stage, kTuneRunFunction, task, backend_, config_file_),
      task);
}

absl::StatusOr<std::optional<TunePlan>> TuneRunner::Plan(const LoadedMethod& method,
                                                         const std::string& stage,
                                                         const TransformBlock& block,
                                                         const ResolvedOptions& options) {
  const auto* table = method.Ext<qm_block_tune>(QM_EXT_BLOCK_TUNE);
  if (!QM_HAS(table, plan) || !QM_HAS(table, run)) {
    return absl::FailedPreconditionError(
        absl::StrCat("plugin ", method.method->id, " has no complete ", QM_EXT_BLOCK_TUNE));
  }
  TuneTask task;
  task.block = &block;
  task.options = &options;
  RunContext context;
  context.stage = stage;
  const LastWordsMark mark(words_, Words(method, context, kTunePlanFunction, task));
  PluginCall call(backend_, Settings(method, stage, kTunePlanFunction, task));
  const BlockView view(block, {});
  qm_quant_plan out = {};
  out.struct_size = sizeof(out);
  const absl::Status status = Invoke(call, table->plan, view.get(), &out);
  if (absl::IsUnimplemented(status)) return std::nullopt;
  QM_RETURN_IF_ERROR(status);
  return TunePlan{out.scratch_bytes, out.flops};
}

absl::Status TuneRunner::TakeTuned(PluginCall& call, const TuneTask& task, TuneOutcome* outcome) {
  outcome->tuned.resize(task.packed.size());
  for (size_t i = 0; i < task.packed.size(); ++i) {
    for (const NamedTensor& fresh : call.TakeEmitted(i)) {
      std::optional<PackedWeight>& tuned = outcome->tuned[i];
      if (!tuned) tuned = task.packed[i];
      const absl::Status status = CheckReplacement(fresh, tuned->Find(fresh.name));
      if (!status.ok()) {
        return WithContext(
            status, absl::StrCat(task.block->slots[i].name, ", emitted tensor '", fresh.name, "'"));
      }
      const auto place = std::find_if(tuned->tensors.begin(), tuned->tensors.end(),
                                      [&](const NamedTensor& t) { return t.name == fresh.name; });
      place->tensor = fresh.tensor;
    }
    if (!outcome->tuned[i]) continue;
    for (NamedTensor& named : outcome->tuned[i]->tensors) {
      QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(named.tensor.dtype(), named.tensor.shape()));
      QM_RETURN_IF_ERROR(backend_.Copy(named.tensor, &host));
      named.tensor = std::move(host);
    }
  }
  return absl::OkStatus();
}

TuneOutcome TuneRunner::Run(const LoadedMethod& method, const RunContext& context,
                            const TuneTask& task) {
  const auto* table = method.Ext<qm_block_tune>(QM_EXT_BLOCK_TUNE);
  TuneOutcome outcome;
  if (context.bundle) {
    outcome.status = SaveCall(method, context, task);
    if (!outcome.status.ok()) return outcome;
  }
  CallSettings settings = Settings(method, context.stage, kTuneRunFunction, task);
  const std::string what = settings.what;
  if (task.plan->scratch_bytes > 0) {
    settings.scratch_limit = task.plan->scratch_bytes + kScratchSlack;
  }
  PluginCall call(backend_, std::move(settings));
  const BlockView view(*task.block, task.weights);
  const PackedViews packed(task);
  const qm_edit* edits = nullptr;
  uint64_t count = 0;
  LastWordsMark mark(words_, Words(method, context, kTuneRunFunction, task));
  outcome.status = Invoke(call, table->run, view.get(), packed.get(), &edits, &count);
  outcome.scratch_peak = call.scratch_peak_bytes();
  if (!outcome.status.ok()) {
    outcome.status = AfterFailure(outcome.status, backend_, mark);
    return outcome;
  }
  // Still under the mark: what the plugin says of its results may point anywhere.
  outcome.status = WithContext(TakeTuned(call, task, &outcome), what);
  if (!outcome.status.ok()) return outcome;
  absl::StatusOr<std::vector<BlockEdit>> taken = TakeEdits(backend_, edits, count);
  outcome.status = WithContext(taken.status(), what);
  if (taken.ok()) outcome.edits = *std::move(taken);
  return outcome;
}

}  // namespace quantmill
