// quantmill worker: the process that loads plugins and computes. Started by `run`, `plan`,
// `bench`, `try` and `replay`; its request comes on stdin, its events go to descriptor 3.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <iostream>
#include <iterator>
#include <mutex>
#include <string>

#include "core/base/status.h"
#include "host/bench/tasks.h"
#include "host/cli/command.h"
#include "host/run/job.h"
#include "host/run/method_runner.h"
#include "host/supervisor/supervise.h"
#include "host/trial/replay_call.h"
#include "host/trial/try_layers.h"

namespace quantmill {
namespace {

// One line per event, from any thread.
class EventPipe {
 public:
  void Write(const nlohmann::json& event) {
    const std::string line =
        event.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t written = 0; written < line.size();) {
      const ssize_t n = write(kEventDescriptor, line.data() + written, line.size() - written);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) _exit(kExitFailed);  // the supervisor is gone
      written += static_cast<size_t>(n);
    }
  }

 private:
  std::mutex mutex_;
};

// What a request asks for: a task of `bench`, one call of `try` or `replay`, else a run or a plan.
absl::StatusOr<nlohmann::ordered_json> Serve(const nlohmann::json& request, const EventSink& sink) {
  const std::string mode =
      request.is_object() && request.contains("mode") && request["mode"].is_string()
          ? request["mode"].get<std::string>()
          : "";
  if (mode == kBenchMode) return RunBenchTask(request, sink);
  if (mode == kTryMode) return RunTryTask(request, sink);
  if (mode == kReplayMode) return RunReplayTask(request, sink);
  QM_ASSIGN_OR_RETURN(const JobRequest job, JobRequestFromJson(request));
  return RunJob(job, sink);
}

absl::StatusOr<int> RunWorkerCommand(const Arguments&) {
  if (fcntl(kEventDescriptor, F_GETFD) < 0) {
    return UsageError("'worker' is started by other commands", "", "use quantmill run");
  }
  fcntl(kEventDescriptor, F_SETFD, FD_CLOEXEC);
  const std::string text((std::istreambuf_iterator<char>(std::cin)), {});
  EventPipe pipe;
  const absl::StatusOr<nlohmann::ordered_json> result =
      Serve(nlohmann::json::parse(text, nullptr, false),
            [&pipe](const nlohmann::json& event) { pipe.Write(event); });
  // Nothing in this process can be trusted any more, destructors included.
  if (IsDeviceLost(result.status())) _exit(kExitDeviceLost);
  pipe.Write(result.ok() ? ResultEvent(*result) : ErrorEvent(result.status()));
  return kExitDone;
}

}  // namespace

Command MakeWorkerCommand() {
  Command command;
  command.name = "worker";
  command.summary = "internal: the worker process of a run";
  command.hidden = true;
  command.run = RunWorkerCommand;
  return command;
}

}  // namespace quantmill
