#include "host/cli/progress.h"

#include <unistd.h>

#include <cmath>
#include <iostream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace quantmill {
namespace {

constexpr double kTerminalInterval = 0.1;
constexpr double kPlainInterval = 5.0;
constexpr double kShortestMeasurement = 2.0;  // below, rates are guesses

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

std::string ProgressLine::Format(const ProgressState& state, const Stage* stage) const {
  std::string text;
  if (state.unit == "percent") {
    text = absl::StrCat(state.stage, " ", state.done, " %");
  } else {
    text = absl::StrCat(state.stage, ": ", state.unit, " ", state.done);
    if (state.total > 0) absl::StrAppend(&text, "/", state.total);
  }
  // A part is shown with the time its stage has left.
  if (stage == nullptr || stage->unit == "percent") return text;
  const int64_t made = stage->done - stage->first_done;
  const double measured = stage->last - stage->start;
  if (made <= 0 || measured < kShortestMeasurement) return text;
  const double seconds_each = measured / static_cast<double>(made);
  if (seconds_each > 1) {
    absl::StrAppendFormat(&text, ", %.1f s/%s", seconds_each, stage->unit);
  } else {
    absl::StrAppendFormat(&text, ", %.0f %ss/s", 1 / seconds_each, stage->unit);
  }
  const double left =
      seconds_each * static_cast<double>(stage->total - stage->done) - (clock_() - stage->last);
  if (left >= 1) absl::StrAppend(&text, ", ", FormatDuration(left), " left");
  return text;
}

void ProgressLine::Update(const ProgressState& state) {
  const double now = clock_();
  const size_t colon = state.stage.find(": ");
  const bool part = colon != std::string::npos;
  const std::string name = state.stage.substr(0, colon);
  if (!part) {
    const Stage fresh{now, now, state.done, state.done, state.total, state.unit, false};
    Stage& stage = stages_.emplace(name, fresh).first->second;
    if (state.done < stage.done || state.unit != stage.unit) stage = fresh;  // it began anew
    stage.done = state.done;
    stage.total = state.total;
    stage.last = now;
  }
  const auto it = stages_.find(name);
  Stage* stage = it == stages_.end() ? nullptr : &it->second;
  const bool ends = !part && state.total > 0 && state.done >= state.total && !stage->ended;
  const double interval = terminal_ ? kTerminalInterval : kPlainInterval;
  if (!ends && now - last_print_ < interval) return;
  if (ends) stage->ended = true;
  const std::string text = Format(state, stage);
  if (text == last_text_) return;
  last_print_ = now;
  Write(text);
}

void ProgressLine::Write(const std::string& text) {
  last_text_ = text;
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
  last_text_.clear();
}

}  // namespace quantmill
