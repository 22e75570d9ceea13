// The result of a run: JSON, per-slot report, and the table on stdout.
#ifndef QUANTMILL_HOST_RUN_REPORT_H_
#define QUANTMILL_HOST_RUN_REPORT_H_

#include <string>
#include <vector>

#include "host/pipeline/plan.h"
#include "host/run/unit_store.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// One entry per stage: name, method, slots, seconds, weight_nmse and, if measured, output_nmse
// (means over the slots that were packed).
nlohmann::ordered_json StageSummary(const PipelinePlan& plan, const std::vector<Unit>& units);

// Per slot what each stage did to it: the damage report in work_dir/report.json.
nlohmann::ordered_json SlotReport(const std::vector<Unit>& units);

// The table for people, from the `run` result.
std::string FormatRunResult(const nlohmann::ordered_json& result);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_REPORT_H_
