#include "sdk/check/case.h"

#include <iterator>
#include <utility>

namespace quantmill::check {

std::string_view StateName(State state) {
  switch (state) {
    case State::kPassed:
      return "passed";
    case State::kSkipped:
      return "skipped";
    case State::kWarning:
      return "warning";
    case State::kFailed:
      return "failed";
    case State::kCrashed:
      return "crashed";
    case State::kTimedOut:
      return "timed out";
  }
  return "?";
}

Verdict Passed(std::string text) { return {State::kPassed, "", std::move(text)}; }
Verdict Skipped(std::string why) { return {State::kSkipped, "", std::move(why)}; }
Verdict Warning(std::string rule, std::string text) {
  return {State::kWarning, std::move(rule), std::move(text)};
}
Verdict Failed(std::string rule, std::string text) {
  return {State::kFailed, std::move(rule), std::move(text)};
}

const std::vector<Case>& AllCases() {
  static const auto* const all = [] {
    auto* cases = new std::vector<Case>;
    for (auto group : {LoadCases, AbiCases, OptionsCases, MemoryCases, QuantizeCases, KernelCases,
                       TransformCases, TuneCases, ReparamCases, AdapterCases, FormatCases}) {
      std::vector<Case> some = group();
      cases->insert(cases->end(), std::make_move_iterator(some.begin()),
                    std::make_move_iterator(some.end()));
    }
    return cases;
  }();
  return *all;
}

}  // namespace quantmill::check
