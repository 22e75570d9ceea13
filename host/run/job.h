// One run of a pipeline inside one process: what the worker does, and what --in-process does.
#ifndef QUANTMILL_HOST_RUN_JOB_H_
#define QUANTMILL_HOST_RUN_JOB_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "host/pipeline/plan.h"
#include "host/supervisor/journal.h"
#include "host/supervisor/process.h"
#include "nlohmann/json.hpp"

namespace quantmill {

struct JobRequest {
  enum class Mode { kPlan, kRun };
  Mode mode = Mode::kRun;
  std::string pipeline_file;
  std::vector<std::string> sets;     // --set a.b=value
  std::vector<std::string> plugins;  // --plugin FILE
  std::string device;                // overrides run.device; empty = as in the file
  std::string work_dir;              // overrides run.work_dir
  bool resume = false;
  std::string last_words;  // file of the mapped record; empty = none
  // Finished units and crashed calls so far (key -> digest): the journal's content.
  JournalState journal;
};
nlohmann::json ToJson(const JobRequest& request);
absl::StatusOr<JobRequest> JobRequestFromJson(const nlohmann::json& json);

// The pipeline of a request: the file, with --set and the overrides applied.
absl::StatusOr<Pipeline> PipelineOf(const JobRequest& request);

// kRun: preflight, quantize, export, verify, evaluate; returns what `run --json` writes. kPlan:
// preflight only; returns PlanReportToJson. Loads plugins into this process. Events:
//   {"type":"progress","stage":S,"unit":U,"done":N,"total":N}
//   {"type":"log","severity":0..2,"text":T}
//   {"type":"begin","key":K,"stage":S,"block":B}   {"type":"end","key":K,"digest":D}
// Errors refused by preflight carry exit code 3 (host/cli/command.h).
absl::StatusOr<nlohmann::ordered_json> RunJob(const JobRequest& request, const EventSink& sink);

nlohmann::ordered_json PlanReportToJson(const PlanReport& report);
absl::StatusOr<PlanReport> PlanReportFromJson(const nlohmann::json& json);

// Plans in a worker process, so that a crashing plan() is an error here. mode is set to kPlan.
absl::StatusOr<PlanReport> PlanInWorker(JobRequest request);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_JOB_H_
