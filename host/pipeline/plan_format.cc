// A plan for people and as JSON.
#include <algorithm>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "host/pipeline/plan.h"

namespace quantmill {
namespace {

// Rows of the table: slots of one role that are treated alike by one stage.
struct Row {
  std::string role, stage, format, statistics, options;
  double bits = 0;
  int64_t scratch = 0;
  int64_t count = 0;
  std::string example;
};

std::string Size(int64_t bytes) {
  if (bytes < 1000) return absl::StrCat(bytes, " B");
  double value = static_cast<double>(bytes);
  const char* unit = "B";
  for (const char* next : {"kB", "MB", "GB", "TB"}) {
    if (value < 1000) break;
    value /= 1000;
    unit = next;
  }
  return absl::StrFormat("%.1f %s", value, unit);
}

std::string ShortFormat(const std::string& id) {
  const std::string prefix = "qm.fmt.";
  return id.rfind(prefix, 0) == 0 ? id.substr(prefix.size()) : id;
}

// Options in which the slots of a stage differ, so that the rows of overrides can be told apart;
// all of a stage that does not pack.
std::set<std::string> Varying(const PlannedStage& stage) {
  std::set<std::string> names;
  for (const ResolvedOptions& options : stage.options) {
    for (const auto& [name, value] : options) {
      if (!stage.packs || stage.options[0].count(name) == 0 || stage.options[0].at(name) != value) {
        names.insert(name);
      }
    }
  }
  names.insert("bits");
  names.insert("group_size");
  return names;
}

std::string OptionsText(const ResolvedOptions& options, const std::set<std::string>& names) {
  std::vector<std::string> parts;
  for (const auto& [name, value] : options) {
    if (names.count(name) != 0) parts.push_back(absl::StrCat(name, "=", value));
  }
  return absl::StrJoin(parts, " ");
}

std::vector<Row> Rows(const PipelinePlan& plan, const PlanReport& report) {
  std::map<std::pair<int, int>, const SlotEstimate*> estimates;
  for (const SlotEstimate& estimate : report.slots) {
    estimates[{estimate.stage, estimate.slot}] = &estimate;
  }
  std::vector<Row> rows;
  for (size_t s = 0; s < plan.stages.size(); ++s) {
    const PlannedStage& stage = plan.stages[s];
    const std::set<std::string> varying = Varying(stage);
    for (size_t i = 0; i < stage.slots.size(); ++i) {
      const LinearSlot& slot = plan.slots[static_cast<size_t>(stage.slots[i])];
      Row row;
      row.role = slot.role.empty() ? slot.name : slot.role;
      row.stage = stage.name == stage.use ? stage.name : absl::StrCat(stage.name, ": ", stage.use);
      row.options = OptionsText(stage.options[i], varying);
      row.example = slot.name;
      const auto it = estimates.find({static_cast<int>(s), stage.slots[i]});
      if (it != estimates.end()) {
        row.format = ShortFormat(it->second->format_id);
        row.statistics = absl::StrJoin(it->second->statistics, " ");
        row.bits = it->second->bits_per_weight;
        row.scratch = it->second->scratch_bytes;
      }
      auto same = std::find_if(rows.begin(), rows.end(), [&row](const Row& other) {
        return other.role == row.role && other.stage == row.stage && other.format == row.format &&
               other.statistics == row.statistics && other.options == row.options &&
               other.bits == row.bits;
      });
      if (same == rows.end()) same = rows.insert(rows.end(), row);
      same->scratch = std::max(same->scratch, row.scratch);
      ++same->count;
    }
  }
  return rows;
}

std::string Table(const std::vector<Row>& rows) {
  std::vector<std::vector<std::string>> cells = {
      {"LAYERS", "COUNT", "STAGE", "FORMAT", "BITS/WEIGHT", "OPTIONS", "STATISTICS", "SCRATCH"}};
  for (const Row& row : rows) {
    cells.push_back(
        {row.role, absl::StrCat(row.count), row.stage, row.format.empty() ? "dense" : row.format,
         row.bits > 0 ? absl::StrFormat("%.3f", row.bits) : "-", row.options,
         row.statistics.empty() ? "-" : row.statistics, row.scratch > 0 ? Size(row.scratch) : "-"});
  }
  std::vector<size_t> widths(cells[0].size(), 0);
  for (const auto& row : cells) {
    for (size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], row[c].size());
  }
  std::string text;
  for (const auto& row : cells) {
    std::string line;
    for (size_t c = 0; c < row.size(); ++c) {
      absl::StrAppend(&line, c ? "  " : "", row[c], std::string(widths[c] - row[c].size(), ' '));
    }
    line.erase(line.find_last_not_of(' ') + 1);
    absl::StrAppend(&text, line, "\n");
  }
  return text;
}

int64_t DenseCount(const PipelinePlan& plan) {
  return std::count(plan.packed_by.begin(), plan.packed_by.end(), -1);
}

std::string Totals(const PipelinePlan& plan, const PlanReport& report) {
  const size_t packed = plan.slots.size() - static_cast<size_t>(DenseCount(plan));
  std::string text = absl::StrCat("layers  ", packed, " packed, ", DenseCount(plan), " dense");
  if (report.bits_per_weight > 0) {
    absl::StrAppendFormat(&text, ", %.3f bits per weight over %d weights", report.bits_per_weight,
                          report.parameters);
  }
  absl::StrAppend(&text, "\nexport  ", plan.pipeline.export_format, " to ",
                  plan.pipeline.export_path);
  if (report.output_bytes > 0) absl::StrAppend(&text, ", about ", Size(report.output_bytes));
  absl::StrAppend(&text, "\n");
  if (!report.device.empty()) absl::StrAppend(&text, "device  ", report.device, "\n");
  if (report.peak_host_bytes > 0) {
    absl::StrAppend(&text, "peaks   host ", Size(report.peak_host_bytes), ", device ",
                    Size(report.peak_device_bytes), ", work directory ", Size(report.work_bytes),
                    "\n");
  }
  if (report.seconds > 0) {
    absl::StrAppendFormat(&text, "time    about %.0f s\n", std::max(1.0, report.seconds));
  }
  for (const std::string& warning : report.warnings) {
    absl::StrAppend(&text, "warning: ", warning, "\n");
  }
  return text;
}

}  // namespace

std::string FormatPlan(const PipelinePlan& plan, const PlanReport& report) {
  return absl::StrCat(Table(Rows(plan, report)), "\n", Totals(plan, report));
}

nlohmann::ordered_json PlanToJson(const PipelinePlan& plan, const PlanReport& report) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const Row& row : Rows(plan, report)) {
    rows.push_back({{"layers", row.role},
                    {"count", row.count},
                    {"example", row.example},
                    {"stage", row.stage},
                    {"options", row.options},
                    {"format", row.format},
                    {"bits_per_weight", row.bits},
                    {"statistics", row.statistics},
                    {"scratch_bytes", row.scratch}});
  }
  return {{"output", plan.pipeline.export_path},
          {"format", plan.pipeline.export_format},
          {"device", report.device},
          {"packed_layers", static_cast<int64_t>(plan.slots.size()) - DenseCount(plan)},
          {"dense_layers", DenseCount(plan)},
          {"parameters", report.parameters},
          {"bits_per_weight", report.bits_per_weight},
          {"peak_device_bytes", report.peak_device_bytes},
          {"peak_host_bytes", report.peak_host_bytes},
          {"work_bytes", report.work_bytes},
          {"output_bytes", report.output_bytes},
          {"seconds", report.seconds},
          {"warnings", report.warnings},
          {"rows", rows}};
}

}  // namespace quantmill
