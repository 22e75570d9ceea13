#include <malloc.h>

#include <string>
#include <vector>

#include "host/cli/command.h"

namespace {

// Activations of the same sizes come and go with every window. By its own heuristics glibc may give
// their memory back to the system each time, to be cleared and mapped again: 29.3 s instead of
// 22.6 for `eval --reference` of 30 windows (small-llama, two cores, 2026-11-29). So freed memory
// stays with the process up to a limit; what is larger than a piece of the heap can be (32 MiB,
// mallopt(3)) is mapped alone as before.
void KeepFreedMemory() {
#ifdef __GLIBC__
  constexpr int kMiB = 1 << 20;
  mallopt(M_MMAP_THRESHOLD, 32 * kMiB);
  mallopt(M_TRIM_THRESHOLD, 128 * kMiB);
#endif
}

}  // namespace

int main(int argc, char** argv) {
  KeepFreedMemory();
  return quantmill::RunCommandLine(quantmill::AllCommands(),
                                   std::vector<std::string>(argv + 1, argv + argc));
}
