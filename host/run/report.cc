#include "host/run/report.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "host/cli/table.h"

namespace quantmill {
namespace {

std::string Number(const nlohmann::ordered_json& json, const char* key, const char* format) {
  const auto it = json.find(key);
  if (it == json.end() || !it->is_number()) return "-";
  return absl::StrFormat(*absl::ParsedFormat<'g'>::New(format), it->get<double>());
}

std::string Fixed(double value, int digits) { return absl::StrFormat("%.*f", digits, value); }

}  // namespace

nlohmann::ordered_json StageSummary(const PipelinePlan& plan, const std::vector<Unit>& units) {
  nlohmann::ordered_json stages = nlohmann::ordered_json::array();
  for (const PlannedStage& stage : plan.stages) {
    double seconds = 0, weight_nmse = 0, output_nmse = 0;
    double loss_before = 0, loss_after = 0;
    int64_t measured = 0, dense = 0, transformed = 0, tuned = 0, untuned = 0, trained = 0;
    std::map<std::string, const SlotRecord*> packed;  // a tuned slot's after tuning
    for (const Unit& unit : units) {
      if (unit.stage != stage.name) continue;
      seconds += unit.seconds;
      for (const SlotRecord& r : unit.slots) {
        if (r.packed) packed[r.slot] = &r;
        if (r.trained) {
          ++trained;
          loss_before = r.loss_before;
          loss_after = r.loss_after;
          continue;
        }
        if (r.tuned) {
          ++(r.error.empty() ? tuned : untuned);
          continue;
        }
        if (r.transformed) transformed += r.edits.empty() ? 0 : 1;
        dense += r.packed || (r.transformed && r.error.empty()) ? 0 : 1;
      }
    }
    for (const auto& [slot, record] : packed) {
      weight_nmse += record->weight_nmse;
      if (record->output_nmse < 0) continue;
      ++measured;
      output_nmse += record->output_nmse;
    }
    const int64_t slots = static_cast<int64_t>(packed.size());
    nlohmann::ordered_json entry = {{"name", stage.name},
                                    {"method", stage.method},
                                    {"slots", trained > 0   ? trained
                                              : stage.packs ? slots
                                                            : transformed},
                                    {"seconds", seconds}};
    if (slots > 0) entry["weight_nmse"] = weight_nmse / static_cast<double>(slots);
    if (measured > 0) entry["output_nmse"] = output_nmse / static_cast<double>(measured);
    if (dense > 0) entry["kept_dense"] = dense;
    if (tuned > 0) entry["tuned"] = tuned;
    if (untuned > 0) entry["tuning_dropped"] = untuned;
    if (trained > 0) {
      entry["loss_first"] = loss_before;
      entry["loss_last"] = loss_after;
    }
    stages.push_back(std::move(entry));
  }
  return stages;
}

nlohmann::ordered_json SlotReport(const std::vector<Unit>& units) {
  nlohmann::ordered_json slots = nlohmann::ordered_json::array();
  for (const Unit& unit : units) {
    for (const SlotRecord& record : unit.slots) {
      nlohmann::ordered_json entry = ToJson(record);
      entry["stage"] = unit.stage;
      slots.push_back(std::move(entry));
    }
  }
  return slots;
}

nlohmann::ordered_json ExpertCoverage(const PipelinePlan& plan, const StageSet& stages,
                                      const std::vector<Unit>& units, std::string* warning) {
  // By name and table: of a method with two, one may measure and the other not.
  std::set<std::pair<std::string, bool>> measuring;
  for (const PreparedStage& stage : stages.stages) {
    if (!stage.method.plans.empty() && !stage.method.plans[0].stats.empty()) {
      measuring.emplace(stage.stage->name, stage.transforms);
    }
  }
  std::map<std::string, const LinearSlot*> expert_slots;
  for (const LinearSlot& slot : plan.slots) {
    if (absl::StartsWith(slot.role, "expert.")) expert_slots[slot.name] = &slot;
  }
  std::map<std::string, std::pair<int64_t, int64_t>> experts;  // name -> rows, rows lacking
  for (const Unit& unit : units) {
    for (const SlotRecord& record : unit.slots) {
      if (!measuring.contains({unit.stage, record.transformed})) continue;
      const auto slot = expert_slots.find(record.slot);
      if (slot == expert_slots.end() || !(record.packed || record.transformed)) continue;
      auto& [rows, lacking] = experts[record.slot.substr(0, record.slot.rfind('.'))];
      rows = record.rows;
      lacking = std::max(lacking, record.in_features - record.rows);
    }
  }
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (experts.empty()) return json;
  std::vector<int64_t> rows;
  std::vector<std::string> none, few;
  for (const auto& [name, seen] : experts) {
    rows.push_back(seen.first);
    if (seen.second > 0) (seen.first == 0 ? none : few).push_back(name);
  }
  std::sort(rows.begin(), rows.end());
  json = {{"experts", static_cast<int64_t>(experts.size())},
          {"experts_without_rows", static_cast<int64_t>(none.size())},
          {"experts_few_rows", static_cast<int64_t>(few.size())},
          {"expert_rows_min", rows.front()},
          {"expert_rows_median", rows[rows.size() / 2]}};
  if (none.empty() && few.empty()) return json;
  const std::string& example = none.empty() ? few[0] : none[0];
  *warning = ErrorText(
      absl::StrCat("of ", experts.size(), " experts, ", none.size(), " saw no calibration row and ",
                   few.size(), " fewer rows than they have inputs (first: ", example, ")"),
      "those are rounded with little or no knowledge of their inputs",
      "use more calibration samples, or text of the model's own domain");
  return json;
}

absl::Status WriteEvaluationWindows(const std::string& work_dir, const EvalResult& result) {
  const nlohmann::ordered_json windows = {{"nll", result.window_nll}, {"kl", result.window_kl}};
  return WriteFile(work_dir + "/evaluation_windows.json", windows.dump() + "\n");
}

std::string FormatRunResult(const nlohmann::ordered_json& result) {
  std::vector<std::vector<std::string>> rows = {
      {"STAGE", "METHOD", "SLOTS", "SECONDS", "WEIGHT NMSE", "OUTPUT NMSE"}};
  for (const auto& stage : result.at("stages")) {
    rows.push_back({stage.at("name"), stage.at("method"),
                    absl::StrCat(stage.at("slots").get<int64_t>()),
                    Fixed(stage.at("seconds").get<double>(), 1),
                    Number(stage, "weight_nmse", "%.3g"), Number(stage, "output_nmse", "%.3g")});
  }
  const double size = result.at("size_bytes").get<double>();
  const double original = result.at("original_bytes").get<double>();
  std::string text = FormatTable(rows);
  absl::StrAppend(&text, "\n", result.at("output").get<std::string>(), ": ",
                  result.at("format").get<std::string>(), ", ",
                  Fixed(result.at("bits_per_weight").get<double>(), 3), " bits per weight, ",
                  Fixed(size / 1e6, 1), " MB (", Fixed(original / 1e6, 1), " MB before), ",
                  Fixed(result.at("seconds").get<double>(), 1), " s\n");
  for (const auto& stage : result.at("stages")) {
    if (!stage.contains("loss_last")) continue;
    absl::StrAppend(&text, "stage ", stage.at("name").get<std::string>(), ": training loss ",
                    Number(stage, "loss_first", "%.4g"), " at first, ",
                    Number(stage, "loss_last", "%.4g"), " at last\n");
  }
  if (const auto it = result.find("adapters"); it != result.end()) {
    for (const auto& adapter : *it) {
      absl::StrAppend(&text, "adapter in ", adapter.get<std::string>(),
                      "; eval, generate and chat take it with --adapter\n");
    }
  }
  if (const auto it = result.find("evaluation"); it != result.end()) {
    absl::StrAppend(&text, "perplexity ", Number(*it, "perplexity", "%.5g"));
    if (it->contains("kl_mean")) {
      absl::StrAppend(&text, ", KL ", Number(*it, "kl_mean", "%.4g"), " nats, top-1 agreement ",
                      Number(*it, "top1_agreement", "%.4g"));
    }
    absl::StrAppend(&text, "\n");
  }
  if (const auto it = result.find("warnings"); it != result.end()) {
    for (const auto& warning : *it)
      absl::StrAppend(&text, "warning: ", warning.get<std::string>(), "\n");
  }
  return text;
}

}  // namespace quantmill
