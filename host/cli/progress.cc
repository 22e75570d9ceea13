#include "host/cli/progress.h"

#include <unistd.h>

#include <cmath>
#include <iostream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace quantmill {
namespace {

constexpr double kTerminalInterval = 0.1;
constexpr double kPlainInterval = 10.0;

double SteadySeconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

std::string FormatDuration(double seconds) {
  const int64_t whole = std::llround(std::max(0.0, seconds));
  if (whole < 60) return absl::StrCat(whole, "s");
  if (whole < 3600) return absl::StrFormat("%d:%02d", whole / 60, whole % 60);
  return absl::StrFormat("%d:%02d:%02d", whole / 3600, whole / 60 % 60, whole % 60);
}

ProgressLine::ProgressLine() : ProgressLine(std::cerr, isatty(STDERR_FILENO) == 1, SteadySeconds) {}

ProgressLine::ProgressLine(std::ostream& out, bool terminal, Clock clock)
    : out_(out), terminal_(terminal), clock_(std::move(clock)) {}

ProgressLine::~ProgressLine() { Clear(); }

std::string ProgressLine::Format(const ProgressState& state) const {
  std::string text = absl::StrCat(state.stage, ": ", state.unit, " ", state.done);
  if (state.total > 0) absl::StrAppend(&text, "/", state.total);
  if (!state.rate.empty()) absl::StrAppend(&text, ", ", state.rate);
  double left = state.seconds_left;
  const double elapsed = clock_() - stage_start_;
  if (left < 0 && elapsed > 0 && state.done > 0 && state.total > state.done) {
    left =
        elapsed * static_cast<double>(state.total - state.done) / static_cast<double>(state.done);
  }
  if (left >= 0) absl::StrAppend(&text, ", ", FormatDuration(left), " left");
  return text;
}

void ProgressLine::Update(const ProgressState& state) {
  const double now = clock_();
  const bool starts = state.stage != stage_;
  if (starts) {
    stage_ = state.stage;
    stage_start_ = now;
  }
  const bool ends = state.total > 0 && state.done >= state.total;
  const double interval = terminal_ ? kTerminalInterval : kPlainInterval;
  if (!starts && !ends && now - last_print_ < interval) return;
  last_print_ = now;
  const std::string text = Format(state);
  if (!terminal_) {
    out_ << text << std::endl;
    return;
  }
  const size_t erase = width_ > text.size() ? width_ - text.size() : 0;
  out_ << '\r' << text << std::string(erase, ' ') << std::flush;
  width_ = text.size();
}

void ProgressLine::Clear() {
  if (!terminal_ || width_ == 0) return;
  out_ << '\r' << std::string(width_, ' ') << '\r' << std::flush;
  width_ = 0;
}

}  // namespace quantmill
