// Requests and plan reports on their way between supervisor and worker.
#include <utility>

#include "absl/strings/str_cat.h"
#include "host/run/job.h"

namespace quantmill {
namespace {

// Runs a parser whose nlohmann calls throw on a missing or mistyped key.
template <typename T, typename Parse>
absl::StatusOr<T> Parsed(const char* what, Parse parse) {
  try {
    return parse();
  } catch (const nlohmann::json::exception& error) {
    return absl::InvalidArgumentError(absl::StrCat("not a ", what, ": ", error.what()));
  }
}

}  // namespace

nlohmann::json ToJson(const JobRequest& request) {
  nlohmann::json crashes = nlohmann::json::array();
  for (const CrashRecord& crash : request.journal.crashes) {
    crashes.push_back({{"key", crash.key}, {"slots", crash.slots}, {"how", crash.how}});
  }
  return {{"mode", request.mode == JobRequest::Mode::kPlan ? "plan" : "run"},
          {"pipeline_file", request.pipeline_file},
          {"sets", request.sets},
          {"plugins", request.plugins},
          {"device", request.device},
          {"work_dir", request.work_dir},
          {"resume", request.resume},
          {"last_words", request.last_words},
          {"finished", request.journal.finished},
          {"crashes", crashes}};
}

absl::StatusOr<JobRequest> JobRequestFromJson(const nlohmann::json& json) {
  return Parsed<JobRequest>("worker request", [&json] {
    JobRequest request;
    request.mode = json.at("mode") == "plan" ? JobRequest::Mode::kPlan : JobRequest::Mode::kRun;
    request.pipeline_file = json.at("pipeline_file");
    request.sets = json.at("sets").get<std::vector<std::string>>();
    request.plugins = json.at("plugins").get<std::vector<std::string>>();
    request.device = json.at("device");
    request.work_dir = json.at("work_dir");
    request.resume = json.at("resume");
    request.last_words = json.at("last_words");
    request.journal.finished = json.at("finished").get<std::map<std::string, std::string>>();
    // The second worker of a run goes on where the first one was lost, perhaps after the export.
    request.resume = request.resume || !request.journal.finished.empty();
    for (const nlohmann::json& crash : json.at("crashes")) {
      request.journal.crashes.push_back({crash.at("key"), crash.at("slots"), crash.at("how")});
    }
    return request;
  });
}

nlohmann::ordered_json PlanReportToJson(const PlanReport& report) {
  nlohmann::ordered_json slots = nlohmann::ordered_json::array();
  for (const SlotEstimate& slot : report.slots) {
    slots.push_back({{"stage", slot.stage},
                     {"slot", slot.slot},
                     {"format_id", slot.format_id},
                     {"bits_per_weight", slot.bits_per_weight},
                     {"statistics", slot.statistics},
                     {"scratch_bytes", slot.scratch_bytes},
                     {"flops", slot.flops}});
  }
  return {{"slots", slots},
          {"parameters", report.parameters},
          {"bits_per_weight", report.bits_per_weight},
          {"device", report.device},
          {"peak_device_bytes", report.peak_device_bytes},
          {"peak_host_bytes", report.peak_host_bytes},
          {"work_bytes", report.work_bytes},
          {"output_bytes", report.output_bytes},
          {"seconds", report.seconds},
          {"warnings", report.warnings}};
}

absl::StatusOr<PlanReport> PlanReportFromJson(const nlohmann::json& json) {
  return Parsed<PlanReport>("plan report", [&json] {
    PlanReport report;
    for (const nlohmann::json& entry : json.at("slots")) {
      SlotEstimate slot;
      slot.stage = entry.at("stage");
      slot.slot = entry.at("slot");
      slot.format_id = entry.at("format_id");
      slot.bits_per_weight = entry.at("bits_per_weight");
      slot.statistics = entry.at("statistics").get<std::vector<std::string>>();
      slot.scratch_bytes = entry.at("scratch_bytes");
      slot.flops = entry.at("flops");
      report.slots.push_back(std::move(slot));
    }
    report.parameters = json.at("parameters");
    report.bits_per_weight = json.at("bits_per_weight");
    report.device = json.at("device");
    report.peak_device_bytes = json.at("peak_device_bytes");
    report.peak_host_bytes = json.at("peak_host_bytes");
    report.work_bytes = json.at("work_bytes");
    report.output_bytes = json.at("output_bytes");
    report.seconds = json.at("seconds");
    report.warnings = json.at("warnings").get<std::vector<std::string>>();
    return report;
  });
}

}  // namespace quantmill
