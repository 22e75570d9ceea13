#include "sdk/check/syscall_watch.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <iterator>
#include <vector>

#include "absl/strings/str_cat.h"

// How it works: a seccomp filter turns the watched system calls into SIGSYS, whose handler looks at
// them and, when they are let through, makes them itself. The filter knows the handler's calls by
// the address of the one instruction that makes them.

#if defined(__x86_64__) || defined(__aarch64__)
#define QM_CAN_WATCH 1
#else
#define QM_CAN_WATCH 0
#endif

#if QM_CAN_WATCH
// long quantmill_check_syscall(long number, long a, ..., long f): the system call and nothing else.
#if defined(__x86_64__)
asm(R"(
  .text
  .hidden quantmill_check_syscall
  .globl quantmill_check_syscall
  .type quantmill_check_syscall, @function
quantmill_check_syscall:
  mov %rdi, %rax
  mov %rsi, %rdi
  mov %rdx, %rsi
  mov %rcx, %rdx
  mov %r8, %r10
  mov %r9, %r8
  mov 8(%rsp), %r9
  syscall
  .hidden quantmill_check_after_syscall
  .globl quantmill_check_after_syscall
quantmill_check_after_syscall:
  ret
  .size quantmill_check_syscall, . - quantmill_check_syscall
)");
#else
asm(R"(
  .text
  .hidden quantmill_check_syscall
  .globl quantmill_check_syscall
  .type quantmill_check_syscall, @function
quantmill_check_syscall:
  mov x8, x0
  mov x0, x1
  mov x1, x2
  mov x2, x3
  mov x3, x4
  mov x4, x5
  mov x5, x6
  svc #0
  .hidden quantmill_check_after_syscall
  .globl quantmill_check_after_syscall
quantmill_check_after_syscall:
  ret
  .size quantmill_check_syscall, . - quantmill_check_syscall
)");
#endif
extern "C" long quantmill_check_syscall(long number, long a, long b, long c, long d, long e,
                                        long f);
extern "C" const char quantmill_check_after_syscall[];
#endif

namespace quantmill::check {
namespace {

std::atomic<WatchPhase> phase{WatchPhase::kOff};

}  // namespace

void SetWatchPhase(WatchPhase next) { phase = next; }

#if QM_CAN_WATCH
namespace {

void (*report)(const std::string& what) = nullptr;

struct Watched {
  long number;
  const char* what;  // "starts a thread"; null: opens the path in argument `path`
  int path;
};
constexpr Watched kWatched[] = {
    {SYS_openat, nullptr, 1},
#if defined(SYS_open)
    {SYS_open, nullptr, 0},
    {SYS_creat, nullptr, 0},
    {SYS_fork, "starts a process", 0},
    {SYS_vfork, "starts a process", 0},
    {SYS_unlink, "removes a file", 0},
    {SYS_mkdir, "makes a folder", 0},
    {SYS_rename, "renames a file", 0},
#endif
    {SYS_openat2, nullptr, 1},
    {SYS_write, "writes to a descriptor (prints, perhaps)", 0},
    {SYS_writev, "writes to a descriptor (prints, perhaps)", 0},
    {SYS_pwrite64, "writes to a descriptor", 0},
    {SYS_socket, "opens a socket", 0},
    {SYS_clone, "starts a thread or process", 0},
    {SYS_clone3, "starts a thread or process", 0},
    {SYS_execve, "starts a program", 0},
    {SYS_unlinkat, "removes a file", 0},
    {SYS_mkdirat, "makes a folder", 0},
    {SYS_renameat2, "renames a file", 0},
};

bool Contains(const char* text, const char* part) { return strstr(text, part) != nullptr; }

bool IsCuda(const char* path) { return Contains(path, "libcuda.so") || Contains(path, "/nvidia"); }

bool IsLibrary(const char* path) {
  return Contains(path, ".so") || Contains(path, "/etc/ld.so") || Contains(path, "/glibc-hwcaps");
}

// What is wrong with the call; empty when it is let through.
std::string Misuse(long number, const long* arguments) {
  const WatchPhase now = phase;
  if (now == WatchPhase::kOff) return "";
  for (const Watched& watched : kWatched) {
    if (watched.number != number) continue;
    if (watched.what != nullptr) return absl::StrCat("it ", watched.what);
    const char* path = reinterpret_cast<const char*>(arguments[watched.path]);
    if (IsCuda(path)) return absl::StrCat("it starts CUDA (opens ", path, ")");
    if (now == WatchPhase::kLoading && IsLibrary(path)) return "";
    return absl::StrCat("it opens ", path);
  }
  return "";
}

void OnCall(int, siginfo_t* info, void* raw) {
  const int saved = errno;
  auto& machine = static_cast<ucontext_t*>(raw)->uc_mcontext;
#if defined(__x86_64__)
  auto& r = machine.gregs;
  const long arguments[] = {r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8], r[REG_R9]};
  auto& result = r[REG_RAX];
#else
  long arguments[6];
  for (int i = 0; i < 6; ++i) arguments[i] = static_cast<long>(machine.regs[i]);
  auto& result = machine.regs[0];
#endif
  const std::string misuse = Misuse(info->si_syscall, arguments);
  if (!misuse.empty()) {
    phase = WatchPhase::kOff;
    report(misuse);
  }
  const long number = info->si_syscall;
  // A new thread would come to life inside this handler.
  const bool is_clone = number == SYS_clone || number == SYS_clone3;
  result = is_clone ? -EAGAIN
                    : quantmill_check_syscall(number, arguments[0], arguments[1], arguments[2],
                                              arguments[3], arguments[4], arguments[5]);
  errno = saved;
}

std::vector<sock_filter> Filter() {
  const uint64_t own = reinterpret_cast<uint64_t>(quantmill_check_after_syscall);
  constexpr uint32_t kPointer = offsetof(seccomp_data, instruction_pointer);
  std::vector<sock_filter> filter = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, kPointer),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint32_t>(own), 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, kPointer + 4),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint32_t>(own >> 32), 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
  };
  for (const Watched& watched : kWatched) {
    filter.push_back(
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint32_t>(watched.number), 0, 1));
    filter.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP));
  }
  filter.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
  return filter;
}

}  // namespace

bool StartWatch(void (*on_misuse)(const std::string& what)) {
  report = on_misuse;
  struct sigaction action = {};
  action.sa_sigaction = OnCall;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;  // reporting a misuse writes, too
  if (sigaction(SIGSYS, &action, nullptr) != 0) return false;
  std::vector<sock_filter> filter = Filter();
  const sock_fprog program = {static_cast<unsigned short>(filter.size()), filter.data()};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

#else

bool StartWatch(void (*)(const std::string& what)) { return false; }

#endif

}  // namespace quantmill::check
