#include "host/supervisor/process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>

#include "absl/strings/str_cat.h"
#include "core/base/clock.h"
#include "core/base/status.h"
#include "core/io/files.h"
#include "host/supervisor/last_words.h"

namespace quantmill {
namespace {

constexpr int kPollMilliseconds = 100;
constexpr double kTerminateSeconds = 5;
// The host's linear algebra is trusted, but a factorization of a large matrix takes minutes.
constexpr double kServicePatience = 24;
constexpr size_t kLongestLine = size_t{64} << 20;  // a worker gone mad must not fill our memory

volatile sig_atomic_t interrupted = 0;
void OnInterrupt(int) { interrupted = 1; }

struct Pipe {
  int read = -1, write = -1;
  ~Pipe() {
    CloseRead();
    CloseWrite();
  }
  absl::Status Open() {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) return SystemError("make a pipe for", "the worker", errno);
    read = ends[0];
    write = ends[1];
    return absl::OkStatus();
  }
  void CloseRead() {
    if (read >= 0) close(read);
    read = -1;
  }
  void CloseWrite() {
    if (write >= 0) close(write);
    write = -1;
  }
};

// Runs in the child between fork and exec: only async-signal-safe calls.
[[noreturn]] void ExecWorker(const char* program, char* const* arguments, int request, int events,
                             pid_t parent) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(127);  // the parent died before the line above
  setpgid(0, 0);                        // Ctrl-C goes to the supervisor, which decides
  signal(SIGINT, SIG_DFL);
  signal(SIGTERM, SIG_DFL);
  signal(SIGPIPE, SIG_DFL);
  // The pipes may sit on the very descriptors they are wanted on.
  const int event_copy = fcntl(events, F_DUPFD, 10);
  const int request_copy = fcntl(request, F_DUPFD, 10);
  dup2(request_copy, STDIN_FILENO);
  dup2(STDERR_FILENO, STDOUT_FILENO);  // a plugin's printf must not get into our output
  dup2(event_copy, kEventDescriptor);
  close(event_copy);
  close(request_copy);
  execv(program, arguments);
  _exit(127);
}

// Splits the byte stream into lines and hands on those that are JSON objects.
class EventReader {
 public:
  explicit EventReader(const EventSink& sink) : sink_(sink) {}
  // False at the end of the stream.
  bool ReadFrom(int descriptor) {
    char buffer[1 << 16];
    const ssize_t n = read(descriptor, buffer, sizeof(buffer));
    if (n < 0) return errno == EINTR || errno == EAGAIN;
    if (n == 0) return false;
    pending_.append(buffer, static_cast<size_t>(n));
    size_t begin = 0;
    for (size_t end; (end = pending_.find('\n', begin)) != std::string::npos; begin = end + 1) {
      const auto event = nlohmann::json::parse(pending_.data() + begin, pending_.data() + end,
                                               nullptr, /*allow_exceptions=*/false);
      if (event.is_object()) sink_(event);
    }
    pending_.erase(0, begin);
    if (pending_.size() > kLongestLine) pending_.clear();
    return true;
  }

 private:
  const EventSink& sink_;
  std::string pending_;
};

// Decides when to end a worker from outside.
class Watchdog {
 public:
  Watchdog(const WorkerOptions& options, LastWords* words, pid_t child, WorkerEnd* end)
      : options_(options), words_(words), child_(child), end_(end) {}

  void Check() {
    if (stopping_) {
      if (SecondsSince(stop_time_) > kTerminateSeconds) kill(child_, SIGKILL);
      return;
    }
    if (options_.interrupted && options_.interrupted()) {
      end_->interrupted = true;
      kill(child_, SIGTERM);
      stopping_ = true;
      stop_time_ = Clock::now();
      return;
    }
    if (words_ == nullptr) return;
    const uint64_t pulse = words_->Pulse();
    if (pulse != pulse_ || !words_->Running()) {
      pulse_ = pulse;
      beat_time_ = Clock::now();
    } else if (SecondsSince(beat_time_) >
               options_.hang_seconds * (words_->InService() ? kServicePatience : 1.0)) {
      end_->hung = true;
      kill(child_, SIGKILL);
      stopping_ = true;
      stop_time_ = Clock::now();
    }
  }

 private:
  const WorkerOptions& options_;
  LastWords* words_;
  pid_t child_;
  WorkerEnd* end_;
  uint64_t pulse_ = ~uint64_t{0};
  Clock::time_point beat_time_ = Clock::now();
  bool stopping_ = false;
  Clock::time_point stop_time_;
};

void WriteAll(int descriptor, const std::string& text) {
  size_t written = 0;
  while (written < text.size()) {
    const ssize_t n = write(descriptor, text.data() + written, text.size() - written);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;  // the worker is gone; its exit status tells the rest
    written += static_cast<size_t>(n);
  }
}

// Has the worker ended? It stays a zombie, so that its process group cannot be another's yet.
bool HasEnded(pid_t child) {
  siginfo_t info = {};
  return waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOHANG | WNOWAIT) == 0 &&
         info.si_pid == child;
}

// Ends what the worker's plugins started and left behind.
void KillGroup(pid_t child) { kill(-child, SIGKILL); }

void Reap(pid_t child, WorkerEnd* end) {
  int status = 0;
  struct rusage usage = {};
  while (wait4(child, &status, 0, &usage) < 0 && errno == EINTR) {
  }
  end->peak_rss_bytes = int64_t{usage.ru_maxrss} * 1024;
  if (WIFSIGNALED(status)) end->signal = WTERMSIG(status);
  if (WIFEXITED(status)) end->exit_code = WEXITSTATUS(status);
}

}  // namespace

std::string WorkerEnd::How(double hang_seconds) const {
  if (hung) return absl::StrCat("hung (no progress for ", hang_seconds, " s)");
  if (exit_code == kExitDeviceLost) return "left the GPU unusable (sticky CUDA error)";
  if (signal != 0) {
    const char* name = sigabbrev_np(signal);
    return absl::StrCat(
        "died (", name == nullptr ? absl::StrCat("signal ", signal) : absl::StrCat("SIG", name),
        ")");
  }
  return absl::StrCat("exited with code ", exit_code);
}

std::string_view WorkerEnd::BrokenRule() const {
  if (hung) return "QM-P-008";
  if (exit_code == kExitDeviceLost || signal == SIGSEGV || signal == SIGBUS) return "QM-P-014";
  if (signal == SIGKILL || signal == SIGTERM || signal == SIGINT) return "";  // or the system's
  return "QM-P-007";
}

absl::StatusOr<WorkerEnd> RunWorker(const WorkerOptions& options, const EventSink& sink) {
  std::unique_ptr<LastWords> words;
  if (!options.last_words.empty()) {
    QM_ASSIGN_OR_RETURN(words, LastWords::Open(options.last_words));
    words->Clear();
  }
  const std::string program = options.program.empty() ? "/proc/self/exe" : options.program;
  std::vector<std::string> texts = {"quantmill"};
  texts.insert(texts.end(), options.arguments.begin(), options.arguments.end());
  std::vector<char*> arguments;
  for (std::string& text : texts) arguments.push_back(text.data());
  arguments.push_back(nullptr);

  Pipe request, events;
  QM_RETURN_IF_ERROR(request.Open());
  QM_RETURN_IF_ERROR(events.Open());
  const pid_t parent = getpid();
  const pid_t child = fork();
  if (child < 0) return SystemError("start", "a worker process", errno);
  if (child == 0) ExecWorker(program.c_str(), arguments.data(), request.read, events.write, parent);

  request.CloseRead();
  events.CloseWrite();
  auto* old_pipe_handler = signal(SIGPIPE, SIG_IGN);
  WriteAll(request.write, options.request);
  request.CloseWrite();

  WorkerEnd end;
  EventReader reader(sink);
  Watchdog watchdog(options, words.get(), child, &end);
  struct pollfd polled = {events.read, POLLIN, 0};
  for (bool open = true, ended = false; open;) {
    const int ready = poll(&polled, 1, ended ? 0 : kPollMilliseconds);
    if (ready > 0) open = reader.ReadFrom(events.read);
    // A process the worker left behind may hold the pipe open for ever: what is in it now is all.
    if (ended && ready <= 0) break;
    if (!ended) watchdog.Check();
    if (!ended && HasEnded(child)) {
      ended = true;
      KillGroup(child);
    }
  }
  // It closed its pipe: most often because it is about to end.
  for (int wait = 1; !HasEnded(child); wait = std::min(2 * wait, kPollMilliseconds)) {
    watchdog.Check();
    poll(nullptr, 0, wait);
  }
  KillGroup(child);
  Reap(child, &end);
  signal(SIGPIPE, old_pipe_handler);
  if (words != nullptr) {
    end.running_call = words->Running();
    end.ended_call = words->Ended();
  }
  if (end.exit_code == 127 && end.signal == 0) {
    return absl::InternalError(absl::StrCat("cannot execute ", program, " as a worker"));
  }
  return end;
}

InterruptGuard::InterruptGuard() {
  interrupted = 0;
  struct sigaction action = {};
  action.sa_handler = OnInterrupt;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

InterruptGuard::~InterruptGuard() {
  signal(SIGINT, SIG_DFL);
  signal(SIGTERM, SIG_DFL);
}

bool InterruptGuard::Interrupted() { return interrupted != 0; }

}  // namespace quantmill
