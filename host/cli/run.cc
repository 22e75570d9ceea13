// quantmill run PIPELINE.yaml: the supervisor's side of a run.
#include <filesystem>
#include <iostream>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "host/cli/command.h"
#include "host/cli/job_request.h"
#include "host/cli/progress.h"
#include "host/pipeline/check.h"
#include "host/run/report.h"
#include "host/supervisor/journal.h"
#include "host/supervisor/supervise.h"

namespace quantmill {
namespace {

// Shows progress and log lines.
class Console {
 public:
  EventSink Sink() {
    return [this](const nlohmann::json& event) { Handle(event); };
  }
  void Clear() { line_.Clear(); }

 private:
  void Handle(const nlohmann::json& event) {
    const std::string type = event.value("type", "");
    if (type == "progress") {
      ProgressState state;
      state.stage = event.value("stage", "");
      state.unit = event.value("unit", "");
      state.done = event.value("done", int64_t{0});
      state.total = event.value("total", int64_t{0});
      line_.Update(state);
    } else if (type == "log" && event.value("severity", 0) >= 2) {
      line_.Clear();
      std::cerr << "warning: " << event.value("text", "") << std::endl;
    }
  }

  ProgressLine line_;
};

std::string JournalPath(const Pipeline& pipeline) { return pipeline.work_dir + "/journal.jsonl"; }
std::string LastWordsPath(const Pipeline& pipeline) { return pipeline.work_dir + "/last_words"; }

absl::StatusOr<std::unique_ptr<Journal>> OpenJournal(const Pipeline& pipeline, bool resume) {
  const std::string path = JournalPath(pipeline);
  QM_ASSIGN_OR_RETURN(const JournalState state, ReadJournal(path));
  if (!state.empty() && !resume) {
    return RefusedError(absl::FailedPreconditionError(
        ErrorText(absl::StrCat("the work directory ", pipeline.work_dir,
                               " holds the journal of an earlier run"),
                  "", "add --resume to continue it, or remove the directory to start over")));
  }
  if (const absl::Status status = CheckFiles(pipeline, resume); !status.ok()) {
    return RefusedError(status);
  }
  std::error_code error;
  std::filesystem::create_directories(pipeline.work_dir, error);
  if (error) return RefusedError(SystemError("create", pipeline.work_dir, error.value()));
  return Journal::Open(path);
}

// A run that was refused leaves no work directory behind, unless something else is in it.
void RemoveWorkDir(const Pipeline& pipeline) {
  std::error_code error;
  std::filesystem::remove(JournalPath(pipeline), error);
  std::filesystem::remove(LastWordsPath(pipeline), error);
  std::filesystem::remove(pipeline.work_dir, error);
}

absl::StatusOr<nlohmann::ordered_json> RunSupervised(JobRequest request, const Pipeline& pipeline,
                                                     Journal& journal, Console& console) {
  SuperviseOptions options;
  options.request = [&request](const JournalState& state) {
    request.journal = state;
    return ToJson(request).dump();
  };
  options.last_words = request.last_words;
  options.hang_seconds = HangSeconds();
  options.crash_dir = pipeline.work_dir + "/crash";
  QM_ASSIGN_OR_RETURN(SuperviseResult result, Supervise(options, &journal, console.Sink()));
  result.value["peak_rss_bytes"] = result.peak_rss_bytes;
  return std::move(result.value);
}

absl::StatusOr<nlohmann::ordered_json> RunInProcess(JobRequest request, Journal& journal,
                                                    Console& console) {
  request.journal = journal.state();
  JournalSink sink(&journal, console.Sink());
  absl::StatusOr<nlohmann::ordered_json> result =
      RunJob(request, [&sink](const nlohmann::json& event) { sink.Handle(event); });
  QM_RETURN_IF_ERROR(sink.status());
  return result;
}

absl::StatusOr<int> Run(const Arguments& arguments) {
  QM_ASSIGN_OR_RETURN(JobRequest request, JobRequestOf(arguments));
  QM_ASSIGN_OR_RETURN(const Pipeline pipeline, PipelineOf(request));
  QM_ASSIGN_OR_RETURN(const std::unique_ptr<Journal> journal,
                      OpenJournal(pipeline, request.resume));
  request.last_words = LastWordsPath(pipeline);
  Console console;
  absl::StatusOr<nlohmann::ordered_json> result =
      arguments.Flag("in-process") ? RunInProcess(request, *journal, console)
                                   : RunSupervised(request, pipeline, *journal, console);
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
  command.run = Run;
  return command;
}

}  // namespace quantmill
