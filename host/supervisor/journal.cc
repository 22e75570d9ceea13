#include "host/supervisor/journal.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/io/files.h"

namespace quantmill {
namespace {

void Apply(const nlohmann::json& line, JournalState* state) {
  const std::string type = TextOf(line, "type");
  if (type == "begin") {
    state->begun = true;
    state->done = false;
  } else if (type == "end") {
    state->finished[TextOf(line, "key")] = TextOf(line, "digest");
  } else if (type == "crash") {
    state->crashes.push_back({TextOf(line, "key"), TextOf(line, "slots"), TextOf(line, "how")});
  } else if (type == "done") {
    state->done = true;
  }
}

// Fills *state and returns how many bytes of `content` are whole lines.
absl::StatusOr<size_t> ParseLines(const std::string& path, const std::string& content,
                                  JournalState* state) {
  size_t begin = 0;
  for (int number = 1; begin < content.size(); ++number) {
    const size_t end = content.find('\n', begin);
    if (end == std::string::npos) break;  // torn
    const auto line = nlohmann::json::parse(content.begin() + static_cast<std::ptrdiff_t>(begin),
                                            content.begin() + static_cast<std::ptrdiff_t>(end),
                                            nullptr, /*allow_exceptions=*/false);
    if (!line.is_object()) {
      const bool last = end + 1 == content.size();
      if (last) break;  // a page of the last line never reached the disk
      return absl::DataLossError(ErrorText(absl::StrCat(path, ":", number, " is no JSON object"),
                                           "the journal was edited or the disk is damaged",
                                           "use another work_dir"));
    }
    Apply(line, state);
    begin = end + 1;
  }
  return begin;
}

absl::StatusOr<std::string> ReadIfThere(const std::string& path) {
  if (!FileExists(path)) return std::string();
  return ReadFile(path);
}

}  // namespace

std::string TextOf(const nlohmann::json& line, const char* key) {
  const auto it = line.find(key);
  return it != line.end() && it->is_string() ? it->get<std::string>() : "";
}

bool CrashRecord::Covers(const std::string& slot) const {
  return absl::StrCat(",", slots, ",").find(absl::StrCat(",", slot, ",")) != std::string::npos;
}

absl::StatusOr<JournalState> ReadJournal(const std::string& path) {
  QM_ASSIGN_OR_RETURN(const std::string content, ReadIfThere(path));
  JournalState state;
  QM_RETURN_IF_ERROR(ParseLines(path, content, &state).status());
  return state;
}

absl::StatusOr<std::unique_ptr<Journal>> Journal::Open(const std::string& path) {
  const int descriptor = open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (descriptor < 0) return SystemError("open journal", path, errno);
  std::unique_ptr<Journal> journal(new Journal(path, descriptor));
  if (flock(descriptor, LOCK_EX | LOCK_NB) != 0) {
    return absl::FailedPreconditionError(ErrorText(
        absl::StrCat("the work directory of ", path, " is in use"),
        "another run holds the lock of its journal", "wait for it or use another work_dir"));
  }
  QM_ASSIGN_OR_RETURN(const std::string content, ReadIfThere(path));
  QM_ASSIGN_OR_RETURN(const size_t whole, ParseLines(path, content, &journal->state_));
  if (whole != content.size() && ftruncate(descriptor, static_cast<off_t>(whole)) != 0) {
    return SystemError("repair journal", path, errno);
  }
  return journal;
}

Journal::~Journal() { close(descriptor_); }

absl::Status Journal::Append(const nlohmann::ordered_json& line) {
  const std::string text =
      line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  size_t written = 0;
  while (written < text.size()) {
    const ssize_t n = write(descriptor_, text.data() + written, text.size() - written);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return SystemError("write journal", path_, errno);
    written += static_cast<size_t>(n);
  }
  if (fdatasync(descriptor_) != 0) return SystemError("write journal", path_, errno);
  Apply(nlohmann::json(line), &state_);
  return absl::OkStatus();
}

absl::Status Journal::Begin(const std::string& key, const std::string& stage, int64_t block) {
  return Append({{"type", "begin"}, {"key", key}, {"stage", stage}, {"block", block}});
}

absl::Status Journal::End(const std::string& key, const std::string& digest) {
  return Append({{"type", "end"}, {"key", key}, {"digest", digest}});
}

absl::Status Journal::Crash(const CrashRecord& crash) {
  return Append(
      {{"type", "crash"}, {"key", crash.key}, {"slots", crash.slots}, {"how", crash.how}});
}

absl::Status Journal::Done() { return Append({{"type", "done"}}); }

}  // namespace quantmill
