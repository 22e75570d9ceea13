// quantmill plan PIPELINE: what `run` would do, and what it would take.
#include <ostream>

#include "core/base/status.h"
#include "core/model/config.h"
#include "host/cli/command.h"
#include "host/cli/job_request.h"
#include "host/pipeline/check.h"
#include "host/plugins/catalog.h"

namespace quantmill {
namespace {

// Everything that can be checked without a worker.
absl::StatusOr<PipelinePlan> CheckAll(const JobRequest& request, const Pipeline& pipeline) {
  QM_RETURN_IF_ERROR(CheckFiles(pipeline, request.resume));
  std::vector<std::string> files = request.plugins;
  files.insert(files.end(), pipeline.plugins.begin(), pipeline.plugins.end());
  QM_ASSIGN_OR_RETURN(const Catalog catalog, DiscoverPlugins(files));
  QM_RETURN_IF_ERROR(CheckNamedPlugins(catalog, files));
  QM_ASSIGN_OR_RETURN(const ModelConfig config, ReadModelConfig(pipeline.model_path));
  return CheckPipeline(pipeline, catalog, config);
}

absl::StatusOr<int> RunPlanCommand(const Arguments& args) {
  QM_ASSIGN_OR_RETURN(const JobRequest request, JobRequestOf(args));
  QM_ASSIGN_OR_RETURN(const Pipeline pipeline, PipelineOf(request));
  const absl::StatusOr<PipelinePlan> plan = CheckAll(request, pipeline);
  if (!plan.ok()) return RefusedError(plan.status());
  QM_ASSIGN_OR_RETURN(const PlanReport report, PlanInWorker(request));
  args.out() << FormatPlan(*plan, report);
  QM_RETURN_IF_ERROR(args.WriteJson(PlanToJson(*plan, report)));
  return kExitDone;
}

}  // namespace

Command MakePlanCommand() {
  return {.name = "plan",
          .summary = "show what run would do and take; refuse what would fail",
          .arguments = {{"PIPELINE", "a pipeline file (.yaml)"}},
          .options = {{.name = "set",
                       .value = "KEY=VALUE",
                       .doc = "change a value of the file, e.g. stages.0.options.bits=3",
                       .repeatable = true},
                      DeviceOption(),
                      {.name = "work-dir", .value = "DIR", .doc = "overrides run.work_dir"},
                      {.name = "resume", .doc = "the output may exist, as for run --resume"},
                      PluginOption()},
          .examples = {"quantmill plan pipeline.yaml",
                       "quantmill plan pipeline.yaml --set stages.0.options.bits=3 --json -"},
          .run = RunPlanCommand};
}

}  // namespace quantmill
