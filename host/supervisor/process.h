// A worker process: this binary executed again, its request on stdin, its events as JSON lines on a
// pipe. It dies with its parent.
#ifndef QUANTMILL_HOST_SUPERVISOR_PROCESS_H_
#define QUANTMILL_HOST_SUPERVISOR_PROCESS_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace quantmill {

using EventSink = std::function<void(const nlohmann::json& event)>;

// The descriptor on which a worker writes its events.
inline constexpr int kEventDescriptor = 3;
// Exit code of a worker whose device can no longer be trusted (a sticky CUDA error).
inline constexpr int kExitDeviceLost = 75;

struct WorkerOptions {
  std::vector<std::string> arguments = {"worker"};  // after the program's name
  std::string program;                              // empty: this binary
  std::string request;                              // written to its stdin
  std::string last_words;  // file watched for a call without heartbeat; empty = not watched
  double hang_seconds = 300;
  // Asked a few times a second; true stops the worker (SIGTERM, then SIGKILL).
  std::function<bool()> interrupted;
};

// How a worker ended.
struct WorkerEnd {
  int exit_code = 0;  // when it exited
  int signal = 0;     // when a signal killed it
  bool hung = false;  // killed by the watchdog
  bool interrupted = false;
  int64_t peak_rss_bytes = 0;
  std::optional<nlohmann::json> running_call;  // last words
  std::optional<nlohmann::json> ended_call;    // between calls: the last one
  // "died (SIGSEGV)", "hung for 300 s", "exited with code 1"
  std::string How(double hang_seconds) const;
  // The rule of RULES.md that a call which ended so broke; "" where it need not be the plugin's
  // doing.
  std::string_view BrokenRule() const;
  bool lost() const { return signal != 0 || hung || exit_code == kExitDeviceLost; }
};

// Runs one worker to its end, handing every event to `sink`. Only failures to start are errors.
absl::StatusOr<WorkerEnd> RunWorker(const WorkerOptions& options, const EventSink& sink);

// While one exists, SIGINT and SIGTERM set a flag instead of ending the process.
class InterruptGuard {
 public:
  InterruptGuard();
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;
  static bool Interrupted();
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_SUPERVISOR_PROCESS_H_
