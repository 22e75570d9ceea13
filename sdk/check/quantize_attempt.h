// One layer given to a quantizer: what plan() and run() said, and what became of the weights.
#ifndef QUANTMILL_SDK_CHECK_QUANTIZE_ATTEMPT_H_
#define QUANTMILL_SDK_CHECK_QUANTIZE_ATTEMPT_H_

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "sdk/check/case.h"
#include "sdk/check/checked_call.h"
#include "sdk/check/quantize_call.h"
#include "sdk/check/synthetic.h"

namespace quantmill::check {

struct Attempt {
  std::string what;  // "33 x 100 with group_size -1", for messages
  CallSetup setup;
  SyntheticLayer layer;
  qm_linear_info info = {};
  PlanAnswer plan;
  RunAnswer run;
  Tensor values;  // dequantized; empty where nothing here reads the format
};

// "33 x 100".
std::string ShapeText(const SyntheticLayer& layer);

// What to try a method with, by name: its defaults; and one group per output channel where it knows
// such an option, so that shapes the default group does not divide are tried too.
std::vector<std::pair<std::string, CallSetup>> Setups(const Subject& subject);

bool AsksForStatistics(const Attempt& attempt);

// Error of `values` against the layer as NMSE: of the outputs if the method asked for statistics
// and there are inputs, else of the weights.
absl::StatusOr<double> ErrorOf(Subject& subject, const Attempt& attempt, const Tensor& values);

// The functions below return a verdict when a rule was broken (or nothing can be tried), else
// nullopt.

// An attempt on a layer whose shape the method accepts with its defaults, before run().
std::optional<Verdict> StartAccepted(Subject& subject, Attempt* attempt);
// The same with another layer of the accepted width.
std::optional<Verdict> StartAccepted(Subject& subject, SyntheticKind kind, int64_t out_features,
                                     int64_t rows, Attempt* attempt);
// Plans and runs. A refusal by either is an answer: plan.code or run.code.
std::optional<Verdict> PlanAndRun(Subject& subject, Attempt* attempt);
// The result has the layer's shape, is valid in the format that plan announced, and finite; its
// error is not above 1. Fills `values`.
std::optional<Verdict> CheckResult(Subject& subject, Attempt* attempt);
// PlanAndRun, and CheckResult where there is a result.
std::optional<Verdict> Try(Subject& subject, Attempt* attempt);
// After PlanAndRun or Try: skipped when plan refused, failed when run refused what plan accepted.
std::optional<Verdict> WantResult(const Attempt& attempt);

// A failure that says nothing about the plugin.
Verdict CheckerFailed(const absl::Status& status);

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_QUANTIZE_ATTEMPT_H_
