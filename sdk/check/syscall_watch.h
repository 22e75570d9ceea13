// Watches what this process asks of the kernel: opening and writing files, sockets, threads,
// processes. Once started it stays to the end of the process.
#ifndef QUANTMILL_SDK_CHECK_SYSCALL_WATCH_H_
#define QUANTMILL_SDK_CHECK_SYSCALL_WATCH_H_

#include <string>

namespace quantmill::check {

enum class WatchPhase {
  kOff,       // everything is let through
  kLoading,   // only shared libraries may be opened, none of them CUDA's driver
  kScanning,  // nothing is let through
};

// False where kernel or processor do not offer it; nothing is watched then. What a phase does not
// let through ends the process: `on_misuse` is called with words like "it opens /etc/passwd" or "it
// starts a thread", and must not return. A call made with all signals blocked, as pthread_create
// makes its own, ends the process by SIGSYS instead.
bool StartWatch(void (*on_misuse)(const std::string& what));

void SetWatchPhase(WatchPhase phase);

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_SYSCALL_WATCH_H_
