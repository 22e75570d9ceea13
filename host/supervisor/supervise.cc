#include "host/supervisor/supervise.h"

#include <signal.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "core/io/sha256.h"
#include "host/cli/command.h"
#include "host/plugins/rule_note.h"

namespace quantmill {
namespace {

constexpr int kAttempts = 2;

absl::Status StatusOf(const nlohmann::json& event) {
  const int code = event.value("code", static_cast<int>(absl::StatusCode::kInternal));
  absl::Status status(static_cast<absl::StatusCode>(code), TextOf(event, "message"));
  switch (event.value("exit", static_cast<int>(kExitFailed))) {
    case kExitUsage:
      return UsageError(status);
    case kExitRefused:
      return RefusedError(status);
    default:
      return status;
  }
}

std::string SlotList(const nlohmann::json& call) {
  std::vector<std::string> slots;
  if (const auto it = call.find("slots"); it != call.end() && it->is_array()) {
    for (const nlohmann::json& slot : *it) {
      if (slot.is_string()) slots.push_back(slot.get<std::string>());
    }
  }
  return slots.empty() ? TextOf(call, "slot") : absl::StrJoin(slots, ",");
}

std::string ReplayHint(const std::string& bundle) {
  if (bundle.empty()) return "";
  return absl::StrCat("; repeat the call with: quantmill replay ", bundle);
}

std::string NoteOf(const WorkerEnd& end) {
  const std::string_view rule = end.BrokenRule();
  return rule.empty() ? "" : RuleNote(rule);
}

nlohmann::json Warning(const std::string& text) {
  return {{"type", "log"}, {"severity", 2}, {"text", text}};
}

class Supervisor {
 public:
  Supervisor(const SuperviseOptions& options, Journal* journal, const EventSink& sink)
      : options_(options), journal_(journal), sink_(sink), journal_sink_(journal, sink) {}

  absl::StatusOr<SuperviseResult> Run() {
    const InterruptGuard guard;
    for (;;) {
      QM_ASSIGN_OR_RETURN(const WorkerEnd end, RunOnce());
      peak_rss_ = std::max(peak_rss_, end.peak_rss_bytes);
      QM_RETURN_IF_ERROR(journal_sink_.status());
      if (end.interrupted) return Interrupted();
      if (last_) {
        SuperviseResult result{nullptr, peak_rss_};
        QM_RETURN_IF_ERROR(ReadAnswer(*last_, &result.value));
        return result;
      }
      QM_RETURN_IF_ERROR(HandleLoss(end));
    }
  }

 private:
  absl::StatusOr<WorkerEnd> RunOnce() {
    last_.reset();
    WorkerOptions worker;
    worker.program = options_.program;
    worker.request = options_.request(journal_ == nullptr ? JournalState() : journal_->state());
    worker.last_words = options_.last_words;
    worker.hang_seconds = options_.hang_seconds;
    worker.interrupted = [this] {
      return InterruptGuard::Interrupted() || !journal_sink_.status().ok();
    };
    return RunWorker(worker, [this](const nlohmann::json& event) {
      const std::string type = TextOf(event, "type");
      if (type == "result" || type == "error") {
        last_ = event;
      } else {
        journal_sink_.Handle(event);
      }
    });
  }

  absl::Status Interrupted() const {
    if (journal_ == nullptr) return absl::CancelledError("interrupted");
    return absl::CancelledError(
        ErrorText("interrupted",
                  absl::StrCat(journal_->state().finished.size(),
                               " finished units are kept in the work directory"),
                  "continue with the same command and --resume"));
  }

  // OK: start another worker.
  absl::Status HandleLoss(const WorkerEnd& end) {
    const std::string how = end.How(options_.hang_seconds);
    if (!end.running_call) return HandleHostLoss(end, how);
    const nlohmann::json& call = *end.running_call;
    const std::string text = absl::StrCat(DescribeLoss(call, how), NoteOf(end));
    const std::string key = TextOf(call, "key");
    // A format or a kernel at work for no unit: the plugin may have been another's victim.
    const bool of_no_unit = key.empty() && !call.contains("options");
    if (journal_ != nullptr && of_no_unit && ++host_losses_ < kAttempts) {
      sink_(Warning(absl::StrCat(text, "; retrying once")));
      return absl::OkStatus();
    }
    if (journal_ == nullptr || key.empty()) {
      return absl::InternalError(absl::StrCat(text, ReplayHint(SavePlanCall(call))));
    }
    QM_RETURN_IF_ERROR(journal_->Crash({key, SlotList(call), text}));
    int count = 0;
    for (const CrashRecord& crash : journal_->state().crashes) {
      count += crash.key == key && crash.Covers(TextOf(call, "slot"));
    }
    const std::string hint = ReplayHint(TextOf(call, "bundle"));
    if (count > kAttempts) return absl::InternalError(absl::StrCat(text, hint));
    sink_(Warning(
        absl::StrCat(text, count < kAttempts ? "; retrying once" : "; not tried again", hint)));
    return absl::OkStatus();
  }

  // plan() sees no tensors: its last words are all of its inputs. The folder, or "" if there is
  // none.
  std::string SavePlanCall(nlohmann::json call) const {
    if (options_.crash_dir.empty() || !call.contains("options")) return "";
    const std::string directory = absl::StrCat(options_.crash_dir, "/plan/", TextOf(call, "stage"),
                                               "/", TextOf(call, "slot"));
    std::error_code error;
    std::filesystem::create_directories(directory, error);
    const absl::StatusOr<std::string> digest = Sha256OfFile(TextOf(call, "path"));
    if (error || !digest.ok()) return "";
    if (call.contains("config")) {  // a transform asks about a block of the model
      std::filesystem::copy_file(TextOf(call, "config"), directory + "/config.json",
                                 std::filesystem::copy_options::overwrite_existing, error);
      if (error) return "";
    }
    call["plugin_sha256"] = *digest;
    const bool written = WriteFile(directory + "/call.json", call.dump(1) + "\n").ok();
    return written ? directory : "";
  }

  absl::Status HandleHostLoss(const WorkerEnd& end, const std::string& how) {
    const std::optional<nlohmann::json>& ended_call = end.ended_call;
    std::string text = absl::StrCat("the worker ", how, " outside of any plugin call");
    if (ended_call) {
      absl::StrAppend(&text, " (the last one was ", TextOf(*ended_call, "function"), " of ",
                      TextOf(*ended_call, "plugin"), " on ", SlotList(*ended_call),
                      "; a plugin that writes to memory it no longer owns does this",
                      RuleNote("QM-P-003"), ")");
    }
    // SIGBUS: a page of a mapped file is not there.
    const char* remedy =
        end.signal == SIGBUS
            ? "a file it was reading became shorter, or its disk is gone or full; everything "
              "finished is kept for --resume"
            : "if the machine ran out of memory, use fewer calibration samples; everything "
              "finished is kept for --resume";
    if (journal_ == nullptr || ++host_losses_ >= kAttempts) {
      return absl::InternalError(ErrorText(text, "", remedy));
    }
    sink_(Warning(absl::StrCat(text, "; retrying once")));
    return absl::OkStatus();
  }

  const SuperviseOptions& options_;
  Journal* journal_;
  const EventSink& sink_;
  JournalSink journal_sink_;
  std::optional<nlohmann::json> last_;
  int64_t peak_rss_ = 0;
  int host_losses_ = 0;
};

}  // namespace

std::string DescribeLoss(const nlohmann::json& call, const std::string& how) {
  std::string text = absl::StrCat("plugin ", TextOf(call, "plugin"), " ", TextOf(call, "version"),
                                  " ", how, " in ", TextOf(call, "function"));
  const auto add = [&text](const char* word, const std::string& what) {
    if (!what.empty()) absl::StrAppend(&text, word, what);
  };
  add(" on ", SlotList(call));
  add(" ", TextOf(call, "shape"));
  add(", stage ", TextOf(call, "stage"));
  return text;
}

void JournalSink::Handle(const nlohmann::json& event) {
  const std::string type = TextOf(event, "type");
  absl::Status status;
  if (journal_ != nullptr && type == "begin") {
    status = journal_->Begin(TextOf(event, "key"), TextOf(event, "stage"),
                             event.value("block", int64_t{0}));
  } else if (journal_ != nullptr && type == "end") {
    status = journal_->End(TextOf(event, "key"), TextOf(event, "digest"));
  }
  if (!status.ok() && status_.ok()) status_ = status;
  next_(event);
}

absl::StatusOr<SuperviseResult> Supervise(const SuperviseOptions& options, Journal* journal,
                                          const EventSink& sink) {
  return Supervisor(options, journal, sink).Run();
}

nlohmann::json ResultEvent(const nlohmann::ordered_json& value) {
  // As text: events are plain JSON objects, which sort their keys.
  return {{"type", "result"},
          {"value", value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)}};
}

nlohmann::json ErrorEvent(const absl::Status& status) {
  return {{"type", "error"},
          {"code", static_cast<int>(status.code())},
          {"message", std::string(status.message())},
          {"exit", ExitCodeOf(status)}};
}

absl::Status ReadAnswer(const nlohmann::json& event, nlohmann::ordered_json* value) {
  if (TextOf(event, "type") != "result") return StatusOf(event);
  *value =
      nlohmann::ordered_json::parse(TextOf(event, "value"), nullptr, /*allow_exceptions=*/false);
  return absl::OkStatus();
}

double HangSeconds() {
  const char* text = getenv("QM_HANG_SECONDS");
  double seconds = 0;
  return text != nullptr && absl::SimpleAtod(text, &seconds) && seconds > 0 ? seconds : 300;
}

}  // namespace quantmill
