// How long something took.
#ifndef QUANTMILL_CORE_BASE_CLOCK_H_
#define QUANTMILL_CORE_BASE_CLOCK_H_

#include <chrono>

namespace quantmill {

using Clock = std::chrono::steady_clock;

inline double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace quantmill

#endif  // QUANTMILL_CORE_BASE_CLOCK_H_
