#include "host/plugins/inspect_child.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "core/base/status.h"

namespace quantmill {
namespace {

constexpr size_t kMostOutput = 4 << 20;

absl::Status SystemError(const std::string& what) {
  return absl::UnavailableError(ErrorText(what, strerror(errno)));
}

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Child {
  pid_t pid = -1;
  int out = -1;  // read ends
  int err = -1;
};

// Only async-signal-safe calls between fork and exec: this process may have threads.
[[noreturn]] void ExecChild(const char* const* argv, pid_t parent, int out, int err) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(127);
  const int null = open("/dev/null", O_RDONLY);
  dup2(null, STDIN_FILENO);
  dup2(out, STDOUT_FILENO);
  dup2(err, STDERR_FILENO);
  execv(argv[0], const_cast<char* const*>(argv));
  _exit(127);
}

absl::StatusOr<Child> Start(const std::string& program, const std::string& plugin) {
  int out[2], err[2];
  if (pipe2(out, O_CLOEXEC) != 0) return SystemError("cannot make a pipe");
  if (pipe2(err, O_CLOEXEC) != 0) {
    close(out[0]);
    close(out[1]);
    return SystemError("cannot make a pipe");
  }
  const char* argv[] = {program.c_str(), "inspect", "--json", "-", plugin.c_str(), nullptr};
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0) ExecChild(argv, parent, out[1], err[1]);
  close(out[1]);
  close(err[1]);
  if (pid > 0) return Child{pid, out[0], err[0]};
  close(out[0]);
  close(err[0]);
  return SystemError("cannot start a process");
}

// Appends what is there; false at the end of the stream. What exceeds the limit is dropped.
bool ReadSome(int fd, std::string* text) {
  char buffer[1 << 16];
  const ssize_t count = read(fd, buffer, sizeof buffer);
  if (count < 0) return errno == EINTR || errno == EAGAIN;
  if (count > 0 && text->size() < kMostOutput) text->append(buffer, static_cast<size_t>(count));
  return count > 0;
}

// Reads both streams until they end or the time is up; true if they ended.
bool Collect(const Child& child, double deadline, std::string* out, std::string* err) {
  pollfd fds[2] = {{child.out, POLLIN, 0}, {child.err, POLLIN, 0}};
  std::string* texts[2] = {out, err};
  while (fds[0].fd >= 0 || fds[1].fd >= 0) {
    const double left = deadline - Now();
    if (left <= 0) return false;
    if (poll(fds, 2, static_cast<int>(left * 1000) + 1) < 0 && errno != EINTR) return false;
    for (int i = 0; i < 2; ++i) {
      if (fds[i].fd >= 0 && fds[i].revents != 0 && !ReadSome(fds[i].fd, texts[i])) fds[i].fd = -1;
    }
  }
  return true;
}

// Waits for the end of the process, which may outlive its streams; kills it when the time is up.
bool Reap(pid_t pid, double deadline, int* status) {
  while (true) {
    const pid_t done = waitpid(pid, status, WNOHANG);
    if (done == pid) return true;
    if (Now() >= deadline) break;
    usleep(2000);
  }
  kill(pid, SIGKILL);
  waitpid(pid, status, 0);
  return false;
}

// The message of the child's first "error: ..." line.
std::string FirstError(const std::string& text) {
  const size_t start = text.find("error: ");
  if (start == std::string::npos) return "";
  const size_t begin = start + 7;
  return text.substr(begin, text.find('\n', begin) - begin);
}

InspectResult Rejected(const std::string& plugin, const std::string& reason, bool lasting) {
  InspectResult result;
  result.info.path = plugin;
  result.info.rejected = reason;
  result.lasting = lasting;
  return result;
}

}  // namespace

absl::StatusOr<InspectResult> InspectInChild(const std::string& program, const std::string& plugin,
                                             double time_limit_seconds) {
  QM_ASSIGN_OR_RETURN(const Child child, Start(program, plugin));
  const double deadline = Now() + time_limit_seconds;
  std::string out, err;
  Collect(child, deadline, &out, &err);
  close(child.out);
  close(child.err);
  int status = 0;
  if (!Reap(child.pid, deadline, &status)) {
    return Rejected(plugin,
                    absl::StrCat("it did not load within ", time_limit_seconds,
                                 " s; a static constructor or its entry function hangs"),
                    false);
  }
  if (WIFSIGNALED(status)) {
    return Rejected(plugin,
                    absl::StrCat("loading it ended in signal ", WTERMSIG(status), " (",
                                 strsignal(WTERMSIG(status)),
                                 "); a static constructor or its entry function crashes"),
                    false);
  }
  if (WEXITSTATUS(status) == 127) {
    return absl::UnavailableError(absl::StrCat("cannot run ", program, " inspect"));
  }
  if (WEXITSTATUS(status) != 0) {
    std::string reason = FirstError(err);
    // The caller names the file.
    const std::string prefix = absl::StrCat("cannot load plugin ", plugin);
    if (reason.rfind(prefix, 0) == 0) reason = reason.substr(prefix.size());
    while (!reason.empty() && (reason[0] == ':' || reason[0] == ';' || reason[0] == ' ')) {
      reason.erase(0, 1);
    }
    if (reason.empty()) reason = absl::StrCat("inspecting it exited with ", WEXITSTATUS(status));
    return Rejected(plugin, reason, true);
  }
  const auto json = nlohmann::json::parse(out, nullptr, false);
  absl::StatusOr<PluginInfo> info = PluginInfoFromJson(json);
  if (!info.ok()) {
    return Rejected(
        plugin,
        absl::StrCat("its description cannot be read; ", std::string(info.status().message()),
                     "; it may write to stdout while it is loaded"),
        true);
  }
  InspectResult result;
  result.info = *std::move(info);
  result.info.path = plugin;
  return result;
}

std::string QuantmillProgram() {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error || self.filename() == "quantmill") return "/proc/self/exe";
  const std::filesystem::path other = self.parent_path().parent_path() / "bin" / "quantmill";
  return std::filesystem::exists(other, error) ? other.string() : "/proc/self/exe";
}

}  // namespace quantmill
