#include "sdk/check/quantize_call.h"

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"

namespace quantmill::check {
namespace {

constexpr uint64_t kMostStats = 64;

// A plan's own description, before anything is done with it.
std::optional<Verdict> CopyPlan(const qm_quant_plan& plan, PlanAnswer* out) {
  if (plan.format_id == nullptr || *plan.format_id == '\0') {
    return Failed("QM-P-010", "plan() gave no format_id; the host cannot tell what will come");
  }
  if (plan.stat_count > kMostStats || (plan.stat_count > 0 && plan.stats == nullptr)) {
    return Failed("QM-P-012", absl::StrCat("plan() asks for ", plan.stat_count, " statistics ",
                                           plan.stats == nullptr ? "at NULL" : ""));
  }
  if (plan.scratch_bytes_shared > plan.scratch_bytes) {
    return Failed("QM-P-015", absl::StrCat("scratch_bytes_shared (", plan.scratch_bytes_shared,
                                           ") is a part of scratch_bytes (", plan.scratch_bytes,
                                           ") and cannot be more"));
  }
  for (uint64_t i = 0; i < plan.stat_count; ++i) {
    const qm_stat_request& request = plan.stats[i];
    if (request.stat_id == nullptr) return Failed("QM-P-012", "plan() asks for a statistic NULL");
    out->stats.push_back({request.stat_id, request.max_rows, request.dtype, request.flags});
  }
  out->scratch_bytes = plan.scratch_bytes;
  out->scratch_bytes_shared = plan.scratch_bytes_shared;
  out->format_id = plan.format_id;
  return std::nullopt;
}

}  // namespace

qm_linear_info LinearInfo(int64_t out_features, int64_t in_features, qm_dtype scale_dtype) {
  qm_linear_info info = {};
  info.struct_size = sizeof info;
  info.name = "model.layers.0.mlp.up_proj";
  info.role = "mlp.up";
  info.out_features = out_features;
  info.in_features = in_features;
  info.weight_dtype = QM_BF16;
  info.scale_dtype = scale_dtype;
  return info;
}

PlanAnswer Plan(Subject& subject, const qm_linear_info& info, const CallSetup& setup) {
  PlanAnswer answer;
  const auto* table = subject.Ext<qm_quantize_linear>(QM_EXT_QUANTIZE_LINEAR);
  CheckedCall call(subject, setup);
  const qm_linear_info* given = call.Struct("the qm_linear_info", info);
  qm_quant_plan empty = {};
  empty.struct_size = sizeof empty;
  qm_quant_plan* plan = call.Struct("the qm_quant_plan", empty);
  answer.code = Invoke(call, table->plan, given, plan);
  answer.violation = call.Finish(answer.code);
  answer.outcome = call.Outcome();
  if (answer.violation || answer.code != QM_OK) return answer;
  answer.violation = CopyPlan(*plan, &answer);
  return answer;
}

StatInputs::StatInputs(CheckedCall& call, Subject& subject, const SyntheticLayer& layer,
                       const PlanAnswer& plan) {
  stats_.struct_size = sizeof stats_;
  stats_.row_count = layer.inputs.dim(0);
  names_.reserve(plan.stats.size());
  for (const PlanAnswer::Wanted& wanted : plan.stats) {
    const qm_stat_request request = {wanted.id.c_str(), wanted.max_rows, wanted.dtype,
                                     wanted.flags};
    const auto measured = MeasureStatistics(*subject.host, layer, absl::MakeConstSpan(&request, 1));
    if (!measured.ok() || measured->empty()) continue;  // unknown: absent
    names_.push_back(wanted.id);
    items_.push_back(
        {names_.back().c_str(),
         call.Input(absl::StrCat("the statistic '", wanted.id, "'"), measured->front().tensor)});
  }
  stats_.items = call.Array<qm_named_tensor>("the list of statistics", absl::MakeConstSpan(items_));
  stats_.count = items_.size();
  given_ = call.Struct("the qm_stats", stats_);
}

RunAnswer Run(Subject& subject, const SyntheticLayer& layer, const qm_linear_info& info,
              const PlanAnswer& plan, const CallSetup& setup) {
  RunAnswer answer;
  const auto* table = subject.Ext<qm_quantize_linear>(QM_EXT_QUANTIZE_LINEAR);
  CheckedCall call(subject, setup);
  const qm_linear_info* given = call.Struct("the qm_linear_info", info);
  const qm_tensor weight = call.Input("the weight", layer.weight);
  const qm_tensor* weight_given =
      call.Array<qm_tensor>("the tensor of the weight", absl::MakeConstSpan(&weight, 1));
  const StatInputs stats(call, subject, layer, plan);
  const qm_packed empty = {};
  qm_packed* packed = call.Array<qm_packed>("the qm_packed", absl::MakeConstSpan(&empty, 1));
  const auto start = std::chrono::steady_clock::now();
  answer.code = Invoke(call, table->run, given, weight_given, stats.get(), packed);
  answer.violation = call.Finish(answer.code);
  answer.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  answer.outcome = call.Outcome();
  answer.scratch_calls = call.scratch_calls();
  answer.emit_calls = call.emit_calls();
  answer.progress_calls = call.progress_calls();
  answer.scratch_bytes = call.scratch_bytes();
  answer.seconds_since_cancel = call.seconds_since_cancel();
  if (answer.violation || answer.code != QM_OK) return answer;
  auto taken = call.TakePacked(*packed);
  if (taken.ok()) {
    answer.packed = *std::move(taken);
  } else {
    answer.violation = Failed("QM-P-009", std::string(taken.status().message()));
  }
  return answer;
}

std::optional<Verdict> FindAcceptedLayer(Subject& subject, const CallSetup& setup,
                                         AcceptedLayer* out) {
  constexpr int64_t kShapes[][2] = {{8, 256}, {64, 128}, {32, 512}, {128, 1024}, {16, 96}};
  std::string refusal;
  for (const auto& [rows, cols] : kShapes) {
    out->info = LinearInfo(rows, cols);
    out->plan = Plan(subject, out->info, setup);
    if (out->plan.violation) return out->plan.violation;
    if (refusal.empty()) refusal = out->plan.outcome;
    if (out->plan.code != QM_OK) continue;
    auto layer =
        MakeSyntheticLayer(SyntheticKind::kOutlierChannels, rows, cols, 2 * cols, subject.seed);
    if (!layer.ok()) return Skipped(std::string(layer.status().message()));
    out->layer = *std::move(layer);
    return std::nullopt;
  }
  return Skipped(
      absl::StrCat("plan() accepts no layer of 8x256, 64x128, 32x512, 128x1024 or "
                   "16x96 with these options: ",
                   refusal));
}

}  // namespace quantmill::check
