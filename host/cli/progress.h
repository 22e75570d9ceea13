// One line that says how far long work has come.
#ifndef QUANTMILL_HOST_CLI_PROGRESS_H_
#define QUANTMILL_HOST_CLI_PROGRESS_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <iosfwd>
#include <string>

namespace quantmill {

struct ProgressState {
  std::string stage;         // "gptq"
  std::string unit;          // what is counted: "block", "window"
  int64_t done = 0;          // of this stage
  int64_t total = 0;         // 0 = unknown
  std::string rate;          // "1830 tokens/s"; empty = not shown
  double seconds_left = -1;  // negative: estimated from the time since the stage began
};

// "1:02:03", "4:05", "12s"
std::string FormatDuration(double seconds);

// On a terminal a single line rewritten in place, at most ten times a second; elsewhere a plain
// line when a stage begins or ends and every ten seconds in between. Not thread-safe.
class ProgressLine {
 public:
  using Clock = std::function<double()>;  // seconds, monotonic
  ProgressLine();                         // stderr
  ProgressLine(std::ostream& out, bool terminal, Clock clock);
  ~ProgressLine();
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  void Update(const ProgressState& state);
  // Takes the line away, so that other text can be written.
  void Clear();

 private:
  std::string Format(const ProgressState& state) const;

  std::ostream& out_;
  bool terminal_;
  Clock clock_;
  std::string stage_;
  double stage_start_ = 0;
  double last_print_ = -1e9;
  size_t width_ = 0;  // characters on the terminal's line
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_CLI_PROGRESS_H_
