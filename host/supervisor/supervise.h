// Runs a job in workers until it is done: keeps the journal, names the plugin call that took a
// worker down, and starts another worker once per failing unit.
#ifndef QUANTMILL_HOST_SUPERVISOR_SUPERVISE_H_
#define QUANTMILL_HOST_SUPERVISOR_SUPERVISE_H_

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "host/supervisor/journal.h"
#include "host/supervisor/process.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// Writes `begin` and `end` events to the journal and passes the others on. The first failure to
// write is kept.
class JournalSink {
 public:
  JournalSink(Journal* journal, EventSink next) : journal_(journal), next_(std::move(next)) {}
  void Handle(const nlohmann::json& event);
  const absl::Status& status() const { return status_; }

 private:
  Journal* journal_;  // null: units are not journaled
  EventSink next_;
  absl::Status status_;
};

struct SuperviseOptions {
  // The worker's request, given what is finished and what crashed so far.
  std::function<std::string(const JournalState&)> request;
  std::string last_words;     // file, made if it is not there
  std::string program;        // empty: this binary
  double hang_seconds = 300;  // without a heartbeat from a plugin call
  // Where the call of a plan() that took the worker down is kept; empty = nowhere.
  std::string crash_dir;
};

struct SuperviseResult {
  nlohmann::ordered_json value;
  int64_t peak_rss_bytes = 0;  // the largest of all workers
};

// journal: null for work without units (planning); a crash is then an error at once. CANCELLED when
// interrupted by SIGINT or SIGTERM.
absl::StatusOr<SuperviseResult> Supervise(const SuperviseOptions& options, Journal* journal,
                                          const EventSink& sink);

// "plugin gptq 0.1.0 died (SIGSEGV) in quantize-linear.run on NAME [384x1024 f32], stage main" from
// a call's last words; how: WorkerEnd::How().
std::string DescribeLoss(const nlohmann::json& call, const std::string& how);

// ---- the worker's last two events ----
nlohmann::json ResultEvent(const nlohmann::ordered_json& value);
nlohmann::json ErrorEvent(const absl::Status& status);
// The inverse of both: OK and the value, or the error with its exit code.
absl::Status ReadAnswer(const nlohmann::json& event, nlohmann::ordered_json* value);

// QM_HANG_SECONDS from the environment, or 300.
double HangSeconds();

}  // namespace quantmill

#endif  // QUANTMILL_HOST_SUPERVISOR_SUPERVISE_H_
