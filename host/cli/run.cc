// quantmill run PIPELINE.yaml: the supervisor's side of a run.
#include <iostream>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "host/cli/command.h"
#include "host/cli/console.h"
#include "host/cli/job_request.h"
#include "host/run/report.h"
#include "host/run/supervised_run.h"
#include "host/supervisor/journal.h"
#include "host/supervisor/supervise.h"

namespace quantmill {
namespace {

absl::StatusOr<nlohmann::ordered_json> RunInProcess(JobRequest request, Journal& journal,
                                                    Console& console) {
  request.journal = journal.state();
  JournalSink sink(&journal, console.Sink());
  absl::StatusOr<nlohmann::ordered_json> result =
      RunJob(request, [&sink](const nlohmann::json& event) { sink.Handle(event); });
  QM_RETURN_IF_ERROR(sink.status());
  return result;
}

absl::StatusOr<int> RunRunCommand(const Arguments& arguments) {
  QM_ASSIGN_OR_RETURN(JobRequest request, JobRequestOf(arguments));
  QM_ASSIGN_OR_RETURN(const Pipeline pipeline, PipelineOf(request));
  QM_ASSIGN_OR_RETURN(const std::unique_ptr<Journal> journal,
                      OpenRunJournal(pipeline, request.resume));
  Console console;
  absl::StatusOr<nlohmann::ordered_json> result =
      arguments.Flag("in-process") ? RunInProcess(request, *journal, console)
                                   : RunSupervised(request, pipeline, *journal, console.Sink());
  console.Clear();
  if (!result.ok()) {
    if (ExitCodeOf(result.status()) == kExitRefused && journal->state().empty()) {
      RemoveWorkDir(pipeline);
    }
    if (ExitCodeOf(result.status()) != kExitFailed || journal->state().finished.empty() ||
        absl::IsCancelled(result.status())) {
      return result.status();
    }
    std::cerr << journal->state().finished.size() << " finished units are kept in "
              << pipeline.work_dir << "; continue with --resume\n";
    return result.status();
  }
  QM_RETURN_IF_ERROR(journal->Done());
  arguments.out() << FormatRunResult(*result);
  QM_RETURN_IF_ERROR(arguments.WriteJson(*result));
  return kExitDone;
}

}  // namespace

Command MakeRunCommand() {
  Command command;
  command.name = "run";
  command.summary = "quantize a model as a pipeline file says, write it, check it, measure it";
  command.arguments = {{"PIPELINE", "a pipeline file (.yaml)", true}};
  command.options = {
      {.name = "set",
       .value = "KEY=VALUE",
       .doc = "change a value of the file, e.g. stages.0.options.bits=3",
       .repeatable = true},
      DeviceOption(),
      {.name = "work-dir", .value = "DIR", .doc = "overrides run.work_dir"},
      {.name = "resume",
       .value = "",
       .doc = "continue an interrupted run, or check a finished one"},
      {.name = "in-process",
       .value = "",
       .doc = "no worker process: for debuggers; a crashing plugin takes the run down"},
      PluginOption()};
  command.examples = {"quantmill run pipeline.yaml", "# continue after an interruption",
                      "quantmill run pipeline.yaml --resume",
                      "quantmill run pipeline.yaml --device cuda:0 --set stages.0.options.bits=3"};
  command.notes =
      "Before any work the file, the model and the machine are checked; what would fail is "
      "refused\n"
      "(exit code 3). Finished parts are kept in the work directory (default: the output's name "
      "with\n"
      ".work), so that --resume goes on after an interruption or a crash. See configs/recipes for\n"
      "pipeline files.";
  command.run = RunRunCommand;
  return command;
}

}  // namespace quantmill
