// What a checked pipeline will do: every stage with its slots and their options (PipelinePlan), and
// what that will take (PlanReport).
#ifndef QUANTMILL_HOST_PIPELINE_PLAN_H_
#define QUANTMILL_HOST_PIPELINE_PLAN_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/model/graph.h"
#include "host/pipeline/pipeline.h"
#include "host/pipeline/train_options.h"
#include "host/worker/call.h"

namespace quantmill {

struct PlannedStage {
  std::string name;    // unique in the pipeline
  std::string use;     // as written
  std::string method;  // its id: "awq", "awq.scale"
  // ABI tables to run on the slots, in order: for a plain "awq" qm.block-transform/1 and then
  // qm.quantize-linear/1.
  std::vector<std::string> tables;
  bool packs = false;  // the slots are packed after it
  bool requantize = false;
  // Indices into PipelinePlan::slots, ascending, and the options of each.
  std::vector<int> slots;
  std::vector<ResolvedOptions> options;
  OnError on_error;                   // the stage's, or run.on_error
  std::string fallback_method;        // on_error: {use: ...}
  ResolvedOptions fallback_options;   // resolved against that method
  std::optional<TrainOptions> train;  // of a method that trains
  SourceLocation location;
};

struct PipelinePlan {
  Pipeline pipeline;
  ModelConfig config;
  // AllSlots(config), then the head when a stage names it.
  std::vector<LinearSlot> slots;
  std::vector<PlannedStage> stages;
  // Per slot: index of the stage whose packing is exported; -1 = stays dense.
  std::vector<int> packed_by;
};

// What the worker found by asking plan() for one slot of one stage.
struct SlotEstimate {
  int stage = 0;  // index into PipelinePlan::stages
  int slot = 0;   // index into PipelinePlan::slots
  std::string format_id;
  double bits_per_weight = 0;           // all that is stored; 0 = unknown
  std::vector<std::string> statistics;  // ids
  int64_t scratch_bytes = 0;
  double flops = 0;
};

struct PlanReport {
  std::vector<SlotEstimate> slots;
  int64_t parameters = 0;      // of the slots that are packed
  double bits_per_weight = 0;  // over them
  std::string device;          // the device it was planned for: "cpu", "cuda:0"
  int64_t peak_device_bytes = 0;
  int64_t peak_host_bytes = 0;
  int64_t work_bytes = 0;    // written to work_dir
  int64_t output_bytes = 0;  // of the exported directory
  double seconds = 0;        // 0 = unknown
  std::vector<std::string> warnings;
};

// A compact table: slots grouped by role and equal treatment, then the totals.
std::string FormatPlan(const PipelinePlan& plan, const PlanReport& report);
nlohmann::ordered_json PlanToJson(const PipelinePlan& plan, const PlanReport& report);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_PIPELINE_PLAN_H_
