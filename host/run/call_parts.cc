#include "host/run/call_parts.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "host/plugins/rule_note.h"

namespace quantmill {

LinearInfoView::LinearInfoView(const LinearSlot& slot, DType weight_dtype, DType scale_dtype)
    : info_{} {
  info_.struct_size = sizeof(info_);
  info_.name = slot.name.c_str();
  info_.role = slot.role.c_str();
  info_.out_features = slot.out_features;
  info_.in_features = slot.in_features;
  info_.weight_dtype = static_cast<qm_dtype>(weight_dtype);
  info_.input_group = slot.input_group;
  info_.scale_dtype = static_cast<qm_dtype>(scale_dtype);
}

std::vector<NamedTensor> MeasuredStatistics(const std::vector<SlotPlan::Stat>& wanted,
                                            int input_group, const Statistics* stats,
                                            bool single_original, int64_t* row_count) {
  *row_count = 0;
  std::vector<NamedTensor> named;
  if (stats == nullptr) return named;
  bool from_original = false;
  for (const SlotPlan::Stat& stat : wanted) {
    StatRequest request = stat.request;
    request.input_group = input_group;
    if (single_original) request.from_original = false;
    const Tensor* tensor = stats->Find(request);
    if (tensor == nullptr) continue;
    from_original = request.from_original;
    named.push_back({std::string(StatId(request.kind)), *tensor});
  }
  *row_count = stats->RowCount(input_group, from_original);
  return named;
}

StatisticsView::StatisticsView(const std::vector<SlotPlan::Stat>& wanted, int input_group,
                               const Statistics* stats, bool single_original)
    : stats_{} {
  stats_.struct_size = sizeof(stats_);
  named_ = MeasuredStatistics(wanted, input_group, stats, single_original, &stats_.row_count);
  for (const NamedTensor& named : named_) {
    items_.push_back({named.name.c_str(), ReadOnlyView(named.tensor)});
  }
  stats_.items = items_.data();
  stats_.count = items_.size();
}

qm_tensor ReadOnlyView(const Tensor& tensor) {
  qm_tensor view = tensor.View();
  view.flags |= QM_TENSOR_READONLY;
  return view;
}

absl::Status AfterFailure(const absl::Status& failure, Backend& backend, LastWordsMark& mark) {
  if (!backend.device().is_cuda() || backend.Synchronize().ok()) return failure;
  mark.Keep();
  return BreaksRule(DeviceLost(failure), "QM-P-014");
}

CallSettings SettingsOf(const std::string& what, const ResolvedOptions& options, uint64_t seed,
                        LastWords* words, PluginLog* log) {
  CallSettings settings;
  settings.what = what;
  settings.options = &options;
  settings.seed = seed;
  settings.progress = [words](double) {
    if (words != nullptr) words->Beat();
    return false;
  };
  settings.service = [words](bool entered) {
    if (words == nullptr) return;
    entered ? words->EnterService() : words->LeaveService();
  };
  settings.log = [log, what](int32_t severity, const std::string& text) {
    log->Line(what, severity, text);
  };
  return settings;
}

namespace {

absl::StatusOr<SlotPlan::Stat> ReadStatRequest(const qm_stat_request& request, int input_group) {
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

absl::StatusOr<std::vector<SlotPlan::Stat>> ReadStatRequests(const qm_quant_plan& plan,
                                                             int input_group) {
  if (plan.stat_count > 0 && plan.stats == nullptr) {
    return absl::InternalError("statistics counted but not listed");
  }
  std::vector<SlotPlan::Stat> stats;
  for (uint64_t i = 0; i < plan.stat_count; ++i) {
    absl::StatusOr<SlotPlan::Stat> stat = ReadStatRequest(plan.stats[i], input_group);
    if (stat.ok()) {
      stats.push_back(*std::move(stat));
    } else if ((plan.stats[i].flags & QM_STAT_OPTIONAL) == 0) {
      return stat.status();
    }
  }
  return stats;
}

}  // namespace quantmill
