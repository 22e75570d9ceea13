// One line that says how far long work has come.
#ifndef QUANTMILL_HOST_CLI_PROGRESS_H_
#define QUANTMILL_HOST_CLI_PROGRESS_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <iosfwd>
#include <map>
#include <string>

namespace quantmill {

struct ProgressState {
  std::string
      stage;         // "gptq"; "gptq: statistics" is a part of gptq, whose end is no end of a stage
  std::string unit;  // what is counted: "block", "window"; "percent" is shown as "25 %"
  int64_t done = 0;  // of this stage
  int64_t total = 0;  // 0 = unknown
};

// "1:02:03", "4:05", "12s"
std::string FormatDuration(double seconds);

// On a terminal a single line rewritten in place, at most ten times a second; elsewhere a plain
// line every five seconds at most and one when a stage ends. Rate and time left are those of the
// whole stage since it was first seen, shown once they mean something. Not thread-safe.
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
  struct Stage {
    double start = 0, last = 0;  // seconds
    int64_t first_done = 0, done = 0, total = 0;
    std::string unit;
    bool ended = false;  // its last line is written
  };

  std::string Format(const ProgressState& state, const Stage* stage) const;
  void Write(const std::string& text);

  std::ostream& out_;
  bool terminal_;
  Clock clock_;
  std::map<std::string, Stage> stages_;
  double last_print_ = -1e9;
  std::string last_text_;
  size_t width_ = 0;  // characters on the terminal's line
};

}  // namespace quantmill

#endif  // QUANTMILL_HOST_CLI_PROGRESS_H_
