// `quantmill replay`: the call of a crash bundle once more.
#ifndef QUANTMILL_HOST_TRIAL_REPLAY_CALL_H_
#define QUANTMILL_HOST_TRIAL_REPLAY_CALL_H_

#include <string>

#include "absl/status/statusor.h"
#include "host/run/crash_bundle.h"
#include "host/supervisor/process.h"
#include "host/trial/session.h"
#include "nlohmann/json.hpp"

namespace quantmill {

struct ReplayRequest {
  std::string directory;  // of the bundle
  // Plugin file, method and device may differ from what the bundle says.
  TrialSetup setup;
  ResolvedOptions options;
};

struct ReplayResult {
  // "succeeded", "failed" (an error was returned, or the result is wrong), "crashed" or "hung"
  std::string outcome;
  std::string text;    // of all but "succeeded": what happened
  TrialResult result;  // of a run() that succeeded
  bool succeeded() const { return outcome == "succeeded"; }
};

// Errors: the call could not be made (bundle, plugin or device cannot be used). CANCELLED after
// SIGINT.
absl::StatusOr<ReplayResult> ReplayInWorker(ReplayRequest request, double hang_seconds);
// The same in this process, for debuggers: a crash is the process's own.
absl::StatusOr<ReplayResult> ReplayInProcess(const ReplayRequest& request);

// The worker's side. `request`: as ReplayInWorker wrote it.
absl::StatusOr<nlohmann::ordered_json> RunReplayTask(const nlohmann::json& request,
                                                     const EventSink& sink);
inline constexpr char kReplayMode[] = "replay";

}  // namespace quantmill

#endif  // QUANTMILL_HOST_TRIAL_REPLAY_CALL_H_
