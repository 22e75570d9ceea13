// A small record in a mapped file that says which plugin call is running. It survives the worker,
// so that the supervisor can name the call that killed it, and it carries the call's heartbeat.
#ifndef QUANTMILL_HOST_SUPERVISOR_LAST_WORDS_H_
#define QUANTMILL_HOST_SUPERVISOR_LAST_WORDS_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace quantmill {

class LastWords {
 public:
  // Creates the file when it is not there; both sides map the same one.
  static absl::StatusOr<std::unique_ptr<LastWords>> Open(const std::string& path);
  ~LastWords();
  LastWords(const LastWords&) = delete;
  LastWords& operator=(const LastWords&) = delete;

  // ---- worker ----
  // A call starts. Words that do not fit are cut off with their options left out.
  void Begin(const nlohmann::json& words);
  // The same with the words as text, for calls that take microseconds.
  void BeginWith(std::string_view text);
  // The call is alive. [any thread]
  void Beat();
  // The call waits for a service of the host (linear algebra), which does not beat. [any thread]
  void EnterService();
  void LeaveService();
  void End();
  // Between Begin and End.
  bool IsMarked() const;

  // ---- supervisor ----
  void Clear();
  // The running call; nullopt between calls.
  std::optional<nlohmann::json> Running() const;
  // The last call that ended; nullopt before, and while one is running.
  std::optional<nlohmann::json> Ended() const;
  // Changes whenever a call begins, ends, beats or enters or leaves a service.
  uint64_t Pulse() const;
  bool InService() const;

 private:
  struct Record;
  std::optional<nlohmann::json> Read() const;
  explicit LastWords(Record* record) : record_(record) {}
  Record* record_;
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_SUPERVISOR_LAST_WORDS_H_
