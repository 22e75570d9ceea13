#include "host/trial/worker_call.h"

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "host/plugins/inspect_child.h"
#include "host/plugins/rule_note.h"
#include "host/supervisor/supervise.h"
#include "host/worker/plugin_log.h"

namespace quantmill {
namespace {

// A file in the system's folder for such, deleted at the end.
class TemporaryFile {
 public:
  static absl::StatusOr<TemporaryFile> Create() {
    std::error_code error;
    const auto folder = std::filesystem::temp_directory_path(error);
    std::string path = (folder / "quantmill-call-XXXXXX").string();
    const int descriptor = error ? -1 : mkstemp(path.data());
    if (descriptor < 0) return SystemError("make a temporary file in", folder.string(), errno);
    close(descriptor);
    return TemporaryFile(std::move(path));
  }
  ~TemporaryFile() {
    if (!path_.empty()) unlink(path_.c_str());
  }
  TemporaryFile(TemporaryFile&& other) noexcept : path_(std::exchange(other.path_, "")) {}
  TemporaryFile& operator=(TemporaryFile&&) = delete;
  const std::string& path() const { return path_; }

 private:
  explicit TemporaryFile(std::string path) : path_(std::move(path)) {}
  std::string path_;
};

std::string LossText(const WorkerEnd& end, double hang_seconds) {
  const std::string how = end.How(hang_seconds);
  const auto& call = end.running_call;
  const std::string note = end.BrokenRule().empty() ? "" : RuleNote(end.BrokenRule());
  if (!call) return absl::StrCat(how, " outside of plan() and run()");
  const std::string slot = call->value("slot", "");
  return absl::StrCat(how, " in ", call->value("function", ""), " of ", call->value("plugin", ""),
                      slot.empty() ? "" : " on ", slot, slot.empty() ? "" : " ",
                      call->value("shape", ""), note);
}

}  // namespace

absl::StatusOr<WorkerCallEnd> CallInWorker(
    const std::function<nlohmann::json(const std::string& last_words)>& request,
    double hang_seconds, const EventSink& sink) {
  QM_ASSIGN_OR_RETURN(const TemporaryFile words, TemporaryFile::Create());
  WorkerOptions options;
  options.program = QuantmillProgram();
  options.request = request(words.path()).dump();
  options.last_words = words.path();
  options.hang_seconds = hang_seconds;
  options.interrupted = InterruptGuard::Interrupted;
  const InterruptGuard guard;
  WorkerCallEnd result;
  result.lost = true;
  QM_ASSIGN_OR_RETURN(const WorkerEnd end, RunWorker(options, [&](const nlohmann::json& event) {
                        const std::string type = event.value("type", "");
                        if (type == "result" || type == "error") {
                          result.lost = false;
                          result.status = ReadAnswer(event, &result.value);
                        } else if (type == "log") {
                          PrintWarning(event.value("severity", 0), event.value("text", ""));
                        } else {
                          sink(event);
                        }
                      }));
  if (end.interrupted) return absl::CancelledError("interrupted");
  if (result.lost) {
    result.hung = end.hung;
    result.text = LossText(end, hang_seconds);
  }
  return result;
}

}  // namespace quantmill
