// What a run has begun, finished and lost, one JSON object per line, in work_dir/journal.jsonl.
// Lines are synced as they are appended; the last one may be torn by a crash and is then dropped.
#ifndef QUANTMILL_HOST_SUPERVISOR_JOURNAL_H_
#define QUANTMILL_HOST_SUPERVISOR_JOURNAL_H_

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace quantmill {

// The text under `key` of an object; empty when there is none.
std::string TextOf(const nlohmann::json& line, const char* key);

// A plugin call that took a worker down.
struct CrashRecord {
  std::string key;    // of the unit
  std::string slots;  // module names, comma between; more than one for a group call
  std::string how;    // "plugin gptq 0.1.0 died (SIGSEGV) in quantize-linear.run on ..."
  bool Covers(const std::string& slot) const;
};

// What the lines say, in order.
struct JournalState {
  std::map<std::string, std::string> finished;  // unit key -> digest of its output
  std::vector<CrashRecord> crashes;
  bool done = false;  // the last run wrote its output
  bool empty() const { return finished.empty() && crashes.empty() && !begun && !done; }
  bool begun = false;
};

// Reads a journal without opening it for writing. A file that is not there is an empty journal; a
// torn last line is dropped; any other line that is no JSON object is DATA_LOSS naming it.
absl::StatusOr<JournalState> ReadJournal(const std::string& path);

class Journal {
 public:
  // Creates or opens `path`, takes its lock (FAILED_PRECONDITION when another run holds it) and
  // cuts off a torn last line.
  static absl::StatusOr<std::unique_ptr<Journal>> Open(const std::string& path);
  ~Journal();
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;

  // What was there when it was opened, and what was appended since.
  const JournalState& state() const { return state_; }

  absl::Status Begin(const std::string& key, const std::string& stage, int64_t block);
  absl::Status End(const std::string& key, const std::string& digest);
  absl::Status Crash(const CrashRecord& crash);
  absl::Status Done();

 private:
  Journal(std::string path, int descriptor) : path_(std::move(path)), descriptor_(descriptor) {}
  absl::Status Append(const nlohmann::ordered_json& line);

  std::string path_;
  int descriptor_;
  JournalState state_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_SUPERVISOR_JOURNAL_H_
