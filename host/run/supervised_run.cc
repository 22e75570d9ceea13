#include "host/run/supervised_run.h"

#include <filesystem>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "host/cli/command.h"
#include "host/pipeline/check.h"
#include "host/supervisor/supervise.h"

namespace quantmill {
namespace {

std::string JournalPath(const Pipeline& pipeline) { return pipeline.work_dir + "/journal.jsonl"; }
std::string LastWordsPath(const Pipeline& pipeline) { return pipeline.work_dir + "/last_words"; }

}  // namespace

absl::StatusOr<std::unique_ptr<Journal>> OpenRunJournal(const Pipeline& pipeline, bool resume) {
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

void RemoveWorkDir(const Pipeline& pipeline) {
  std::error_code error;
  std::filesystem::remove(JournalPath(pipeline), error);
  std::filesystem::remove(LastWordsPath(pipeline), error);
  std::filesystem::remove(pipeline.work_dir, error);
}

absl::StatusOr<nlohmann::ordered_json> RunSupervised(JobRequest request, const Pipeline& pipeline,
                                                     Journal& journal, const EventSink& sink) {
  request.last_words = LastWordsPath(pipeline);
  SuperviseOptions options;
  options.request = [&request](const JournalState& state) {
    request.journal = state;
    return ToJson(request).dump();
  };
  options.last_words = request.last_words;
  options.hang_seconds = HangSeconds();
  options.crash_dir = pipeline.work_dir + "/crash";
  QM_ASSIGN_OR_RETURN(SuperviseResult result, Supervise(options, &journal, sink));
  result.value["peak_rss_bytes"] = result.peak_rss_bytes;
  return std::move(result.value);
}

}  // namespace quantmill
