#include "host/run/transform_runner.h"

#include <algorithm>
#include <memory>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "host/plugins/rule_note.h"
#include "host/run/block_view.h"
#include "host/run/call_parts.h"
#include "host/run/transform_bundle.h"
#include "host/worker/invoke.h"

namespace quantmill {

std::vector<ScaleSite> SitesAmong(const ModelConfig& config, const TransformBlock& block) {
  std::set<std::string> names;
  for (const LinearSlot& slot : block.slots) names.insert(slot.name);
  std::vector<ScaleSite> sites = BlockSites(config, block.block);
  std::erase_if(sites, [&](const ScaleSite& site) {
    if (site.producer_is_slot && !names.contains(site.producer)) return true;
    return std::any_of(site.consumers.begin(), site.consumers.end(), [&](const SiteConsumer& c) {
      return c.is_slot() && !names.contains(c.name);
    });
  });
  return sites;
}

TransformRunner::TransformRunner(Backend& backend, LastWords* words, EventSink sink,
                                 std::string config_file)
    : backend_(backend),
      words_(words),
      sink_(std::move(sink)),
      config_file_(std::move(config_file)),
      log_([this](int32_t severity, const std::string& text) {
        sink_({{"type", "log"}, {"severity", severity}, {"text", text}});
      }) {}

CallSettings TransformRunner::Settings(const LoadedMethod& method, const std::string& stage,
                                       const std::string& function, const TransformTask& task) {
  CallSettings settings =
      SettingsOf(absl::StrCat("stage ", stage, ", plugin ", method.method->id, " ",
                              method.method->version, ", ", function, ", ", task.block->name),
                 *task.options, task.seed, words_, &log_);
  settings.block = task.trials;
  return settings;
}

nlohmann::json TransformRunner::Words(const LoadedMethod& method, const RunContext& context,
                                      const std::string& function,
                                      const TransformTask& task) const {
  nlohmann::json words =
      DescribeTransformCall(method, context.stage, function, task, backend_, config_file_);
  words["key"] = context.key;
  words["slots"] = nlohmann::json::array({task.block->name});
  words["shape"] = absl::StrCat("[", task.block->slots.size(), " linears]");
  if (context.bundle) words["bundle"] = context.BundleOf(task.block->name);
  return words;
}

absl::Status TransformRunner::SaveCall(const LoadedMethod& method, const RunContext& context,
                                       const TransformTask& task) {
  return WriteTransformBundle(context.BundleOf(task.block->name), backend_,
                              DescribeTransformCall(method, context.stage, kTransformRunFunction,
                                                    task, backend_, config_file_),
                              task);
}

absl::StatusOr<TransformPlan> TransformRunner::Plan(const LoadedMethod& method,
                                                    const std::string& stage,
                                                    const TransformBlock& block,
                                                    const ResolvedOptions& options) {
  const auto* table = method.Ext<qm_block_transform>(QM_EXT_BLOCK_TRANSFORM);
  if (!QM_HAS(table, plan) || !QM_HAS(table, run)) {
    return absl::FailedPreconditionError(
        absl::StrCat("plugin ", method.method->id, " does not transform blocks"));
  }
  TransformTask task;
  task.block = &block;
  task.options = &options;
  RunContext context;
  context.stage = stage;
  const LastWordsMark mark(words_, Words(method, context, kTransformPlanFunction, task));
  CallSettings settings = Settings(method, stage, kTransformPlanFunction, task);
  const std::string what = settings.what;
  PluginCall call(backend_, std::move(settings));
  const BlockView view(*task.block, task.weights);
  qm_quant_plan out = {};
  out.struct_size = sizeof(out);
  QM_RETURN_IF_ERROR(Invoke(call, table->plan, view.get(), &out));
  TransformPlan plan;
  absl::StatusOr<std::vector<SlotPlan::Stat>> stats = ReadStatRequests(out, -1);
  if (!stats.ok()) return WithContext(stats.status(), what);
  plan.stats = *std::move(stats);
  plan.scratch_bytes = out.scratch_bytes;
  plan.flops = out.flops;
  return plan;
}

TransformOutcome TransformRunner::Run(const LoadedMethod& method, const RunContext& context,
                                      const TransformTask& task) {
  const auto* table = method.Ext<qm_block_transform>(QM_EXT_BLOCK_TRANSFORM);
  TransformOutcome outcome;
  if (context.bundle) {
    outcome.status = SaveCall(method, context, task);
    if (!outcome.status.ok()) return outcome;
  }
  CallSettings settings = Settings(method, context.stage, kTransformRunFunction, task);
  const std::string what = settings.what;
  if (task.plan->scratch_bytes > 0) {
    settings.scratch_limit = task.plan->scratch_bytes + kScratchSlack;
  }
  PluginCall call(backend_, std::move(settings));
  const BlockView view(*task.block, task.weights);
  std::vector<std::unique_ptr<StatisticsView>> stats;
  std::vector<const qm_stats*> pointers;
  for (const LinearSlot& slot : task.block->slots) {
    stats.push_back(std::make_unique<StatisticsView>(task.plan->stats, slot.input_group, task.stats,
                                                     task.stats_from_original));
    pointers.push_back(stats.back()->get());
  }
  const qm_edit* edits = nullptr;
  uint64_t count = 0;
  LastWordsMark mark(words_, Words(method, context, kTransformRunFunction, task));
  outcome.status = Invoke(call, table->run, view.get(), pointers.data(), &edits, &count);
  outcome.scratch_peak = call.scratch_peak_bytes();
  if (!outcome.status.ok()) {
    outcome.status = AfterFailure(outcome.status, backend_, mark);
    return outcome;
  }
  // Still under the mark: what the plugin says of its edits may point anywhere.
  absl::StatusOr<std::vector<BlockEdit>> taken = TakeEdits(backend_, edits, count);
  outcome.status = BreaksRule(WithContext(taken.status(), what), kEditRule);
  if (taken.ok()) outcome.edits = *std::move(taken);
  return outcome;
}

}  // namespace quantmill
