// Something done in a worker process and reported back, whether the worker lives or not.
#ifndef QUANTMILL_HOST_TRIAL_WORKER_CALL_H_
#define QUANTMILL_HOST_TRIAL_WORKER_CALL_H_

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "host/supervisor/process.h"
#include "nlohmann/json.hpp"

namespace quantmill {

struct WorkerCallEnd {
  bool lost = false;  // the worker ended without an answer
  bool hung = false;  // because a plugin call showed no sign of life
  std::string text;   // of a lost one: "died (SIGSEGV) in quantize-linear.run of NAME on LAYER"
  // Of one that answered: its error, or OK and its value.
  absl::Status status;
  nlohmann::ordered_json value;
};

// Runs `quantmill worker` with the request that `request` makes, given the file for its last words.
// Events other than the answer and log lines go to `sink`; warnings to stderr. An error: the worker
// could not be started, or (CANCELLED) the user interrupted it.
absl::StatusOr<WorkerCallEnd> CallInWorker(
    const std::function<nlohmann::json(const std::string& last_words)>& request,
    double hang_seconds, const EventSink& sink);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_TRIAL_WORKER_CALL_H_
