// The result of a run: JSON, per-slot report, and the table on stdout.
#ifndef QUANTMILL_HOST_RUN_REPORT_H_
#define QUANTMILL_HOST_RUN_REPORT_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "core/eval/evaluate.h"
#include "host/pipeline/plan.h"
#include "host/run/stage_set.h"
#include "host/run/unit_store.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// One entry per stage: name, method, slots, seconds, weight_nmse and, if measured, output_nmse
// (means over the slots that were packed).
nlohmann::ordered_json StageSummary(const PipelinePlan& plan, const std::vector<Unit>& units);

// Per slot what each stage did to it: the damage report in work_dir/report.json.
nlohmann::ordered_json SlotReport(const std::vector<Unit>& units);

// How many calibration rows reached the experts of a mixture, over the stages that measure their
// inputs: experts, experts_without_rows, experts_few_rows (fewer than inputs, so that the Hessian
// cannot have full rank), expert_rows_min, expert_rows_median. An empty object without such slots.
// *warning says the same to people when an expert saw too few; else it is left empty.
nlohmann::ordered_json ExpertCoverage(const PipelinePlan& plan, const StageSet& stages,
                                      const std::vector<Unit>& units, std::string* warning);

// WORK_DIR/evaluation_windows.json: the scores of every window, for comparing runs on the same
// text.
absl::Status WriteEvaluationWindows(const std::string& work_dir, const EvalResult& result);

// The table for people, from the `run` result.
std::string FormatRunResult(const nlohmann::ordered_json& result);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_REPORT_H_
