// Cases of qm.quantize-linear/1: odd shapes and values, statistics that say little, the call's
// promises (cancel, determinism, groups), and the quality of the result.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "sdk/check/case.h"
#include "sdk/check/checked_call.h"
#include "sdk/check/packed_samples.h"
#include "sdk/check/plain_rounding.h"
#include "sdk/check/quantize_call.h"
#include "sdk/check/synthetic.h"

namespace quantmill::check {
namespace {

constexpr char kDefined[] = "QM-C-001";
constexpr char kQuality[] = "QM-C-002";
constexpr char kGroup[] = "QM-C-003";
constexpr char kCancel[] = "QM-P-008";
constexpr char kContents[] = "QM-P-010";
constexpr char kDeterministic[] = "QM-P-011";
constexpr char kPlanRefuses[] = "QM-P-012";

// ---- a layer, what plan() and run() said of it, and what became of the weights ------------------

struct Attempt {
  std::string what;  // "33 x 100 with group_size -1", for messages
  CallSetup setup;
  SyntheticLayer layer;
  qm_linear_info info = {};
  PlanAnswer plan;
  RunAnswer run;
  Tensor values;  // dequantized; empty where nothing here reads the format
};

std::string ShapeText(const SyntheticLayer& layer) {
  return absl::StrCat(layer.weight.dim(0), " x ", layer.weight.dim(1));
}

bool HasOption(const qm_method& method, std::string_view name) {
  for (uint64_t i = 0; i < method.option_count; ++i) {
    if (method.options[i].name == name) return true;
  }
  return false;
}

// Defaults; and one group per output channel where the method knows such an option, so that shapes
// the default group does not divide are tried too.
std::vector<std::pair<std::string, CallSetup>> Setups(const Subject& subject) {
  CallSetup defaults;
  defaults.options = DefaultOptions(*subject.method);
  defaults.seed = subject.seed;
  std::vector<std::pair<std::string, CallSetup>> setups = {{"defaults", defaults}};
  if (HasOption(*subject.method, "group_size")) {
    defaults.options["group_size"] = "-1";
    setups.push_back({"group_size -1", defaults});
  }
  return setups;
}

bool AsksForStatistics(const Attempt& attempt) { return !attempt.plan.stats.empty(); }

// Plans and runs. A refusal by either is an answer, not an error.
std::optional<Verdict> PlanAndRun(Subject& subject, Attempt* attempt) {
  attempt->info = LinearInfo(attempt->layer.weight.dim(0), attempt->layer.weight.dim(1));
  attempt->plan = Plan(subject, attempt->info, attempt->setup);
  if (attempt->plan.violation) return attempt->plan.violation;
  if (attempt->plan.code != QM_OK) return std::nullopt;
  attempt->run = Run(subject, attempt->layer, attempt->info, attempt->plan, attempt->setup);
  return attempt->run.violation;
}

// Parameters, names, dtypes and shapes of a result; *values holds its dense values afterwards.
std::optional<Verdict> CheckResult(Subject& subject, Attempt* attempt) {
  const PackedWeight& packed = attempt->run.packed;
  const Tensor& weight = attempt->layer.weight;
  if (packed.out_features != weight.dim(0) || packed.in_features != weight.dim(1)) {
    return Failed(kContents, absl::StrCat(attempt->what, ": the result says it is [",
                                          packed.out_features, ", ", packed.in_features, "]"));
  }
  if (packed.format_id != attempt->plan.format_id) {
    return Failed(kContents,
                  absl::StrCat(attempt->what, ": plan announced ", attempt->plan.format_id,
                               ", the result is ", packed.format_id));
  }
  const absl::Status valid = subject.formats->Check(packed);
  if (valid.code() == absl::StatusCode::kNotFound) return std::nullopt;
  if (!valid.ok()) {
    return Failed(kContents, absl::StrCat(attempt->what, ": the result is not in its format: ",
                                          std::string(valid.message())));
  }
  absl::StatusOr<Tensor> values = DequantizeOnHost(subject, packed);
  if (values.ok()) attempt->values = *std::move(values);
  return std::nullopt;
}

// Whatever went in, the values are finite, and no further from the weights than nothing at all: in
// the outputs if the method asked for statistics, in the weights if not.
std::optional<Verdict> CheckValues(Subject& subject, const Attempt& attempt) {
  if (attempt.values.empty()) return std::nullopt;
  const float* values = attempt.values.as<float>();
  for (int64_t i = 0; i < attempt.values.elements(); ++i) {
    if (std::isfinite(values[i])) continue;
    return Failed(kDefined,
                  absl::StrFormat("%s: value %d of the result is %g", attempt.what, i, values[i]));
  }
  const bool by_output = AsksForStatistics(attempt) && attempt.layer.inputs.dim(0) > 0;
  const absl::StatusOr<double> nmse = by_output
                                          ? OutputNmse(*subject.host, attempt.layer, attempt.values)
                                          : WeightNmse(attempt.layer.weight, attempt.values);
  if (!nmse.ok()) return Failed(kDefined, std::string(nmse.status().message()));
  if (*nmse <= 1.0) return std::nullopt;
  return Failed(kDefined,
                absl::StrFormat("%s: the %s has %.3g times the energy of the %s itself; "
                                "a result of zeros would be closer",
                                attempt.what, by_output ? "output's error" : "weight's error",
                                *nmse, by_output ? "output" : "weight"));
}

// Plans, runs and looks at the result. Afterwards run.code or plan.code may be a refusal.
std::optional<Verdict> Try(Subject& subject, Attempt* attempt) {
  if (auto verdict = PlanAndRun(subject, attempt)) return verdict;
  if (attempt->plan.code != QM_OK || attempt->run.code != QM_OK) return std::nullopt;
  if (auto verdict = CheckResult(subject, attempt)) return verdict;
  return CheckValues(subject, *attempt);
}

// An attempt on a layer whose shape the method accepts with its defaults, before any call.
std::optional<Verdict> StartAccepted(Subject& subject, Attempt* attempt) {
  attempt->setup = Setups(subject)[0].second;
  AcceptedLayer accepted;
  if (auto verdict = FindAcceptedLayer(subject, attempt->setup, &accepted)) return verdict;
  attempt->layer = std::move(accepted.layer);
  attempt->info = accepted.info;
  attempt->plan = std::move(accepted.plan);
  attempt->what = ShapeText(attempt->layer);
  return std::nullopt;
}

// A verdict unless the run gave a result.
std::optional<Verdict> WantResult(const Attempt& attempt) {
  if (attempt.run.violation) return attempt.run.violation;
  if (attempt.run.code == QM_OK) return std::nullopt;
  return Failed(kPlanRefuses,
                absl::StrCat(attempt.what, ": plan accepted, run refused: ", attempt.run.outcome));
}

Verdict FromStatus(const absl::Status& status) {
  return Failed("", absl::StrCat("the checker itself failed: ", std::string(status.message())));
}

// ---- shapes
// --------------------------------------------------------------------------------------

struct ShapeToTry {
  int64_t out = 0, in = 0;
};

// Each shape with each setup: plan refuses it, or run gives a good result.
Verdict TryShapes(Subject& subject, const std::vector<ShapeToTry>& shapes) {
  std::string seen;
  for (const ShapeToTry& shape : shapes) {
    for (const auto& [name, setup] : Setups(subject)) {
      Attempt attempt;
      attempt.setup = setup;
      auto layer = MakeSyntheticLayer(SyntheticKind::kOutlierChannels, shape.out, shape.in,
                                      2 * shape.in + 8, subject.seed);
      if (!layer.ok()) return FromStatus(layer.status());
      attempt.layer = *std::move(layer);
      attempt.what = absl::StrCat(ShapeText(attempt.layer), " with ", name);
      if (auto verdict = Try(subject, &attempt)) return *verdict;
      const bool planned = attempt.plan.code == QM_OK;
      if (planned) {
        if (auto verdict = WantResult(attempt)) return *verdict;
      }
      absl::StrAppend(&seen, seen.empty() ? "" : "; ", attempt.what,
                      planned ? ": quantized" : ": refused by plan");
    }
  }
  return Passed(seen);
}

Verdict OneByOne(Subject& subject) { return TryShapes(subject, {{1, 1}}); }
Verdict OddShapes(Subject& subject) { return TryShapes(subject, {{7, 131}, {33, 100}, {1, 257}}); }
Verdict GroupDoesNotDivide(Subject& subject) { return TryShapes(subject, {{16, 200}, {16, 96}}); }

Verdict RealSize(Subject& subject) {
  Attempt attempt;
  attempt.setup = Setups(subject)[0].second;
  // Few rows: the Hessian's rank is small, its size is what matters here.
  auto layer = MakeSyntheticLayer(SyntheticKind::kOutlierChannels, 14336, 4096, 256, subject.seed);
  if (!layer.ok()) return FromStatus(layer.status());
  attempt.layer = *std::move(layer);
  attempt.what = ShapeText(attempt.layer);
  if (auto verdict = Try(subject, &attempt)) return *verdict;
  if (attempt.plan.code != QM_OK) return Skipped("refused by plan: " + attempt.plan.outcome);
  if (auto verdict = WantResult(attempt)) return *verdict;
  return Passed(absl::StrFormat("%.2f s, %.3f bits per weight", attempt.run.seconds,
                                attempt.run.packed.BitsPerWeight()));
}

// ---- values
// --------------------------------------------------------------------------------------

// Runs on an accepted layer after `change` has been at it. A refusal with text passes if it is
// allowed to refuse.
template <typename Change>
Verdict TryChanged(Subject& subject, const std::string& change_name, Change change) {
  Attempt attempt;
  if (auto verdict = StartAccepted(subject, &attempt)) return *verdict;
  change(&attempt.layer);
  absl::StrAppend(&attempt.what, ", ", change_name);
  if (auto verdict = Try(subject, &attempt)) return *verdict;
  if (attempt.plan.code != QM_OK) return Skipped("refused by plan: " + attempt.plan.outcome);
  if (attempt.run.code != QM_OK) return Passed("refused: " + attempt.run.outcome);
  return Passed(attempt.values.empty() ? "a result in a format nothing here reads"
                                       : "a defined result");
}

// Weights that are odd but valid must be quantized.
template <typename Change>
Verdict MustQuantize(Subject& subject, const std::string& change_name, Change change) {
  Verdict verdict = TryChanged(subject, change_name, change);
  if (verdict.state != State::kPassed || verdict.text.rfind("refused", 0) != 0) return verdict;
  return Failed(kDefined, absl::StrCat(change_name, " are valid weights; ", verdict.text));
}

Verdict ConstantRows(Subject& subject) {
  return MustQuantize(subject, "constant rows", [](SyntheticLayer* layer) {
    for (int64_t r = 0; r < layer->weight.dim(0); ++r) {
      const float value = (r % 2 == 0 ? 0.03f : -0.07f) * static_cast<float>(r + 1);
      float* row = layer->weight.as<float>() + r * layer->weight.dim(1);
      std::fill(row, row + layer->weight.dim(1), value);
    }
  });
}

Verdict ZeroWeights(Subject& subject) {
  return MustQuantize(subject, "zero weights", [](SyntheticLayer* layer) {
    std::fill_n(layer->weight.as<float>(), layer->weight.elements(), 0.0f);
  });
}

Verdict NotFiniteWeights(Subject& subject) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), kInfinity, -kInfinity}) {
    Attempt attempt;
    if (auto verdict = StartAccepted(subject, &attempt)) return *verdict;
    attempt.layer.weight.as<float>()[attempt.layer.weight.elements() / 2] = value;
    if (auto verdict = PlanAndRun(subject, &attempt)) return *verdict;
    if (attempt.run.code != QM_OK) continue;
    return Failed(kDefined,
                  absl::StrFormat("%s with a weight of %g: a result came back; refuse with "
                                  "QM_INVALID_ARGUMENT, naming the weight",
                                  attempt.what, value));
  }
  return Passed("NaN and both infinities refused");
}

// Statistics of a broken model: a refusal, or a result that is defined all the same.
Verdict NotFiniteInputs(Subject& subject) {
  Attempt attempt;
  if (auto verdict = StartAccepted(subject, &attempt)) return *verdict;
  if (!AsksForStatistics(attempt)) return Skipped("the method asks for no statistics");
  for (const float value :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const SyntheticLayer clean = attempt.layer;
    attempt.layer.inputs = Tensor::FromF32(
        clean.inputs.shape(), absl::MakeConstSpan(clean.inputs.as<float>(),
                                                  static_cast<size_t>(clean.inputs.elements())));
    attempt.layer.inputs.as<float>()[0] = value;
    if (auto verdict = PlanAndRun(subject, &attempt)) return *verdict;
    attempt.layer = clean;
    attempt.what = absl::StrFormat("an input of %g", value);
    if (attempt.run.code != QM_OK) continue;
    if (auto verdict = CheckResult(subject, &attempt)) return *verdict;
    if (auto verdict = CheckValues(subject, attempt)) return *verdict;
  }
  return Passed(attempt.run.code == QM_OK ? "a defined result" : "refused: " + attempt.run.outcome);
}

// ---- statistics
// ----------------------------------------------------------------------------------

// The first rows of a tensor, as a tensor of its own.
Tensor FirstRows(const Tensor& matrix, int64_t rows) { return matrix.Rows(0, rows); }

template <typename Change>
Verdict TryStatistics(Subject& subject, const std::string& change_name, Change change) {
  Attempt attempt;
  if (auto verdict = StartAccepted(subject, &attempt)) return *verdict;
  if (!AsksForStatistics(attempt)) return Skipped("the method asks for no statistics");
  return TryChanged(subject, change_name, change);
}

Verdict RankDeficient(Subject& subject) {
  return TryStatistics(subject, "3 rows of inputs", [](SyntheticLayer* layer) {
    layer->inputs = FirstRows(layer->inputs, 3);
    layer->original_inputs = FirstRows(layer->original_inputs, 3);
  });
}

// Every third channel, or all of them, never carries anything.
void ClearChannels(SyntheticLayer* layer, int64_t step) {
  for (const Tensor* inputs : {&layer->inputs, &layer->original_inputs}) {
    const int64_t cols = inputs->dim(1);
    for (int64_t r = 0; r < inputs->dim(0); ++r) {
      for (int64_t c = 0; c < cols; c += step) inputs->as<float>()[r * cols + c] = 0.0f;
    }
  }
}

Verdict DeadChannels(Subject& subject) {
  return TryStatistics(subject, "a third of the inputs always 0",
                       [](SyntheticLayer* layer) { ClearChannels(layer, 3); });
}

Verdict ZeroHessian(Subject& subject) {
  return TryStatistics(subject, "inputs always 0",
                       [](SyntheticLayer* layer) { ClearChannels(layer, 1); });
}

Verdict NoRows(Subject& subject) {
  Attempt attempt;
  if (auto verdict = StartAccepted(subject, &attempt)) return *verdict;
  attempt.layer.inputs = FirstRows(attempt.layer.inputs, 0);
  attempt.layer.original_inputs = FirstRows(attempt.layer.original_inputs, 0);
  absl::StrAppend(&attempt.what, ", row_count 0");
  if (auto verdict = Try(subject, &attempt)) return *verdict;
  if (attempt.run.code == QM_OK) return Passed("a defined result");
  if (attempt.run.code == QM_FAILED_PRECONDITION) return Passed("refused: " + attempt.run.outcome);
  return Failed(kDefined, absl::StrCat(attempt.what,
                                       ": expected a defined result or FAILED_PRECONDITION, got ",
                                       attempt.run.outcome));
}

// ---- promises of the call
// ------------------------------------------------------------------------

// run() on the attempt's layer whose weight rows lie apart.
RunAnswer RunStrided(Subject& subject, const Attempt& attempt) {
  RunAnswer answer;
  CheckedCall call(subject, attempt.setup);
  const int64_t rows = attempt.layer.weight.dim(0), cols = attempt.layer.weight.dim(1);
  const StatInputs stats(call, subject, attempt.layer, attempt.plan);
  const qm_tensor weight = call.StridedInput(
      "the weight", rows, cols, cols + 24,
      absl::MakeConstSpan(attempt.layer.weight.as<float>(), static_cast<size_t>(rows * cols)));
  const auto* table = subject.Ext<qm_quantize_linear>(QM_EXT_QUANTIZE_LINEAR);
  qm_packed packed = {};
  answer.code = Invoke(call, table->run, &attempt.info, &weight, stats.get(), &packed);
  answer.violation = call.Finish(answer.code);
  answer.outcome = call.Outcome();
  if (answer.violation || answer.code != QM_OK) return answer;
  absl::StatusOr<PackedWeight> taken = call.TakePacked(packed);
  if (taken.ok()) {
    answer.packed = *std::move(taken);
  } else {
    answer.violation = Failed("QM-P-009", std::string(taken.status().message()));
  }
  return answer;
}

Verdict StridedWeight(Subject& subject) {
  Attempt attempt;
  if (auto verdict = StartAccepted(subject, &attempt)) return *verdict;
  if (auto verdict = PlanAndRun(subject, &attempt)) return *verdict;
  if (auto verdict = WantResult(attempt)) return *verdict;
  const RunAnswer strided = RunStrided(subject, attempt);
  if (strided.violation) return *strided.violation;
  if (strided.code == QM_INVALID_ARGUMENT) return Passed("refused: " + strided.outcome);
  if (strided.code != QM_OK) {
    return Failed(kDefined, absl::StrCat("rows of the weight lie apart: expected the same result "
                                         "or INVALID_ARGUMENT, got ",
                                         strided.outcome));
  }
  const std::string difference = PackedDifference(attempt.run.packed, strided.packed);
  if (difference.empty()) return Passed("the same result");
  return Failed(kDefined, absl::StrCat("rows of the weight lie apart: ", difference));
}

Verdict Cancel(Subject& subject) {
  constexpr double kSeconds = 2.0;
  Attempt attempt;
  if (auto verdict = StartAccepted(subject, &attempt)) return *verdict;
  auto larger = MakeSyntheticLayer(SyntheticKind::kOutlierChannels, 512,
                                   attempt.layer.weight.dim(1), 64, subject.seed);
  if (!larger.ok()) return FromStatus(larger.status());
  attempt.layer = *std::move(larger);
  attempt.setup.cancel_at = 0;
  if (auto verdict = PlanAndRun(subject, &attempt)) return *verdict;
  if (attempt.plan.code != QM_OK) return Skipped("refused by plan: " + attempt.plan.outcome);
  const RunAnswer& run = attempt.run;
  if (run.progress_calls == 0) {
    if (run.seconds <= kSeconds) {
      return Passed(absl::StrFormat("done in %.3f s without asking", run.seconds));
    }
    return Failed(kCancel,
                  absl::StrFormat("%.1f s of work without a call of progress", run.seconds));
  }
  if (run.seconds_since_cancel > kSeconds) {
    return Failed(kCancel, absl::StrFormat("went on for %.1f s after progress had said stop",
                                           run.seconds_since_cancel));
  }
  if (run.code == QM_CANCELLED) {
    return Passed(absl::StrFormat("stopped within %.3f s", run.seconds_since_cancel));
  }
  return Failed(kCancel, absl::StrCat("progress said stop at the first call; expected "
                                      "QM_CANCELLED, got ",
                                      run.outcome));
}

Verdict Repeatable(Subject& subject) {
  if ((subject.method->flags & QM_METHOD_DETERMINISTIC) == 0) {
    return Skipped("the method does not say that it is deterministic");
  }
  Attempt attempt;
  if (auto verdict = StartAccepted(subject, &attempt)) return *verdict;
  auto larger = MakeSyntheticLayer(SyntheticKind::kCorrelatedInputs, 96,
                                   attempt.layer.weight.dim(1), 300, subject.seed);
  if (!larger.ok()) return FromStatus(larger.status());
  attempt.layer = *std::move(larger);
  if (auto verdict = PlanAndRun(subject, &attempt)) return *verdict;
  if (auto verdict = WantResult(attempt)) return *verdict;
  const RunAnswer again = Run(subject, attempt.layer, attempt.info, attempt.plan, attempt.setup);
  if (again.violation) return *again.violation;
  const std::string difference = PackedDifference(attempt.run.packed, again.packed);
  if (difference.empty()) return Passed("the same bytes twice");
  return Failed(kDeterministic, absl::StrCat("the same call twice: ", difference));
}

Verdict ThreadCounts(Subject& subject) {
  if (subject.on_cuda()) return Skipped("on the CPU only");
  if ((subject.method->flags & QM_METHOD_DETERMINISTIC) == 0) {
    return Skipped("the method does not say that it is deterministic");
  }
  Attempt attempt;
  if (auto verdict = StartAccepted(subject, &attempt)) return *verdict;
  auto larger = MakeSyntheticLayer(SyntheticKind::kCorrelatedInputs, 96,
                                   attempt.layer.weight.dim(1), 300, subject.seed);
  if (!larger.ok()) return FromStatus(larger.status());
  attempt.layer = *std::move(larger);
  std::optional<PackedWeight> first;
  for (const int threads : {1, 2, 5}) {
    auto backend = MakeCpuBackend(threads);
    if (!backend.ok()) return FromStatus(backend.status());
    Subject other = subject;
    other.backend = other.host = backend->get();
    if (auto verdict = PlanAndRun(other, &attempt)) return *verdict;
    if (auto verdict = WantResult(attempt)) return *verdict;
    if (!first) first = attempt.run.packed;
    const std::string difference = PackedDifference(*first, attempt.run.packed);
    if (difference.empty()) continue;
    return Failed(kDeterministic, absl::StrCat(threads, " threads against 1: ", difference));
  }
  return Passed("1, 2 and 5 threads give the same bytes");
}

Verdict FormatCheck(Subject& subject) {
  Attempt attempt;
  if (auto verdict = StartAccepted(subject, &attempt)) return *verdict;
  if (auto verdict = Try(subject, &attempt)) return *verdict;
  if (auto verdict = WantResult(attempt)) return *verdict;
  const absl::Status valid = subject.formats->Check(attempt.run.packed);
  if (valid.ok()) return Passed(attempt.run.packed.format_id);
  return Skipped(std::string(valid.message()));
}

// ---- run_group
// -----------------------------------------------------------------------------------

// Three linears on one input, in one call. Equal input groups see the same statistics tensors.
std::optional<Verdict> RunGroup(Subject& subject, std::vector<Attempt>& attempts,
                                std::vector<PackedWeight>* out) {
  CheckedCall call(subject, attempts[0].setup);
  const StatInputs stats(call, subject, attempts[0].layer, attempts[0].plan);
  std::vector<const qm_linear_info*> infos;
  std::vector<qm_tensor> weights;
  for (const Attempt& attempt : attempts) {
    infos.push_back(&attempt.info);
    weights.push_back(call.Input("a weight", attempt.layer.weight));
  }
  const std::vector<const qm_stats*> all_stats(attempts.size(), stats.get());
  std::vector<qm_packed> packed(attempts.size());
  const auto* table = subject.Ext<qm_quantize_linear>(QM_EXT_QUANTIZE_LINEAR);
  const qm_status code = Invoke(call, table->run_group, attempts.size(), infos.data(),
                                weights.data(), all_stats.data(), packed.data());
  if (auto verdict = call.Finish(code)) return verdict;
  if (code != QM_OK) {
    return Failed(kGroup,
                  absl::StrCat("run accepted each linear, run_group refused: ", call.Outcome()));
  }
  for (size_t i = 0; i < attempts.size(); ++i) {
    absl::StatusOr<PackedWeight> taken = call.TakePacked(packed[i], i);
    if (!taken.ok()) return Failed("QM-P-009", std::string(taken.status().message()));
    out->push_back(*std::move(taken));
  }
  return std::nullopt;
}

Verdict GroupEqualsSingle(Subject& subject) {
  const auto* table = subject.Ext<qm_quantize_linear>(QM_EXT_QUANTIZE_LINEAR);
  if (!QM_HAS(table, run_group)) return Skipped("no run_group");
  Attempt first;
  if (auto verdict = StartAccepted(subject, &first)) return *verdict;
  std::vector<Attempt> attempts;
  for (const int64_t out_features : {first.layer.weight.dim(0), int64_t{24}, int64_t{40}}) {
    Attempt attempt;
    attempt.setup = first.setup;
    auto layer = MakeSyntheticLayer(SyntheticKind::kCorrelatedInputs, out_features,
                                    first.layer.weight.dim(1), 300,
                                    subject.seed + static_cast<uint64_t>(attempts.size()));
    if (!layer.ok()) return FromStatus(layer.status());
    attempt.layer = *std::move(layer);
    if (!attempts.empty()) {
      attempt.layer.inputs = attempts[0].layer.inputs;
      attempt.layer.original_inputs = attempts[0].layer.original_inputs;
    }
    attempt.what = ShapeText(attempt.layer);
    if (auto verdict = PlanAndRun(subject, &attempt)) return *verdict;
    if (attempt.plan.code != QM_OK) return Skipped("refused by plan: " + attempt.plan.outcome);
    if (auto verdict = WantResult(attempt)) return *verdict;
    attempts.push_back(std::move(attempt));
  }
  std::vector<PackedWeight> together;
  if (auto verdict = RunGroup(subject, attempts, &together)) return *verdict;
  for (size_t i = 0; i < attempts.size(); ++i) {
    const std::string difference = PackedDifference(attempts[i].run.packed, together[i]);
    if (difference.empty()) continue;
    return Failed(kGroup, absl::StrCat("linear ", i, " (", attempts[i].what,
                                       ") alone against in a group: ", difference));
  }
  return Passed("3 linears give the same bytes alone and together");
}

// ---- quality
// -------------------------------------------------------------------------------------

// Output error if the method asked for statistics, else weight error.
absl::StatusOr<double> ErrorOf(Subject& subject, const Attempt& attempt, const Tensor& values) {
  return AsksForStatistics(attempt) ? OutputNmse(*subject.host, attempt.layer, values)
                                    : WeightNmse(attempt.layer.weight, values);
}

// The worse of the plain roundings that store no more bits, with what it was; 1 where none fits.
absl::StatusOr<double> PlainError(Subject& subject, const Attempt& attempt, std::string* rule) {
  double worst = 0.0;
  *rule = "zeros";
  for (const PlainRule& plain :
       PlainRulesWithin(attempt.run.packed.BitsPerWeight(), attempt.layer.weight.dim(1))) {
    const Tensor rounded = RoundPlainly(attempt.layer.weight, plain);
    const absl::StatusOr<double> error = ErrorOf(subject, attempt, rounded);
    if (!error.ok()) return error.status();
    if (*error < worst) continue;
    worst = *error;
    *rule = plain.ToString();
  }
  return *rule == "zeros" ? 1.0 : worst;
}

Verdict NotWorseThanPlain(Subject& subject) {
  // Ties and sums in another order; the range rules of plain roundings differ by more.
  constexpr double kTolerance = 1.02;
  Attempt attempt;
  if (auto verdict = StartAccepted(subject, &attempt)) return *verdict;
  const int64_t in = attempt.layer.weight.dim(1);
  auto layer = MakeSyntheticLayer(SyntheticKind::kOutlierChannels, 64, in, 4 * in, subject.seed);
  if (!layer.ok()) return FromStatus(layer.status());
  attempt.layer = *std::move(layer);
  attempt.what = ShapeText(attempt.layer);
  if (auto verdict = Try(subject, &attempt)) return *verdict;
  if (attempt.plan.code != QM_OK) return Skipped("refused by plan: " + attempt.plan.outcome);
  if (auto verdict = WantResult(attempt)) return *verdict;
  if (attempt.values.empty()) {
    return Skipped(absl::StrCat("no plugin here reads ", attempt.run.packed.format_id,
                                "; name its plugin with --plugin"));
  }
  const absl::StatusOr<double> error = ErrorOf(subject, attempt, attempt.values);
  if (!error.ok()) return FromStatus(error.status());
  std::string rule;
  const absl::StatusOr<double> plain = PlainError(subject, attempt, &rule);
  if (!plain.ok()) return FromStatus(plain.status());
  const std::string text =
      absl::StrFormat("%s NMSE %.4g at %.3f bits per weight; plain rounding (%s): %.4g",
                      AsksForStatistics(attempt) ? "output" : "weight", *error,
                      attempt.run.packed.BitsPerWeight(), rule, *plain);
  return *error <= kTolerance * *plain ? Passed(text) : Failed(kQuality, text);
}

Case Quantize(std::string name, std::vector<std::string> rules, std::string asserts,
              Verdict (*run)(Subject&), double limit_seconds = 20, bool slow = false) {
  return {"quantize." + std::move(name),
          std::move(rules),
          std::move(asserts),
          Scope::kMethod,
          QM_EXT_QUANTIZE_LINEAR,
          run,
          limit_seconds,
          slow};
}

}  // namespace

std::vector<Case> QuantizeCases() {
  return {
      Quantize("result_is_in_its_format", {kContents},
               "The result has the shape of the linear and passes the check of its format.",
               FormatCheck),
      Quantize("one_by_one", {kDefined, kPlanRefuses},
               "A 1 x 1 linear is quantized, or refused by plan.", OneByOne),
      Quantize("odd_shapes", {kDefined, kPlanRefuses},
               "Odd shapes are quantized, or refused by plan.", OddShapes),
      Quantize("group_does_not_divide", {kDefined, kPlanRefuses},
               "Widths that usual groups do not divide are quantized, or refused by plan.",
               GroupDoesNotDivide),
      Quantize("real_size", {kDefined}, "A 14336 x 4096 linear is quantized, or refused by plan.",
               RealSize, 300, true),
      Quantize("constant_rows", {kDefined}, "Rows of one value give a defined result.",
               ConstantRows),
      Quantize("zero_weights", {kDefined}, "Weights of 0 give a defined result.", ZeroWeights),
      Quantize("not_finite_weights", {kDefined}, "NaN and infinite weights are refused.",
               NotFiniteWeights),
      Quantize("not_finite_inputs", {kDefined},
               "Statistics that are not finite are refused, or give a defined result.",
               NotFiniteInputs),
      Quantize("rank_deficient_statistics", {kDefined},
               "Statistics of 3 rows give a defined result, or are refused with text.",
               RankDeficient),
      Quantize("dead_channels", {kDefined},
               "Channels that never carry anything give a defined result, or a refusal with text.",
               DeadChannels),
      Quantize("zero_statistics", {kDefined},
               "Statistics that are all 0 give a defined result, or are refused with text.",
               ZeroHessian),
      Quantize("no_rows", {kDefined},
               "row_count 0 gives a defined result, or QM_FAILED_PRECONDITION.", NoRows),
      Quantize("strided_weight", {kDefined},
               "A weight whose rows lie apart gives the same result, or QM_INVALID_ARGUMENT.",
               StridedWeight),
      Quantize("cancel", {kCancel}, "When progress says stop, run returns QM_CANCELLED within 2 s.",
               Cancel),
      Quantize("same_bytes_twice", {kDeterministic},
               "A deterministic method gives the same bytes for the same call.", Repeatable),
      Quantize("same_bytes_for_any_threads", {kDeterministic},
               "A deterministic method gives the same bytes with 1, 2 and 5 threads.",
               ThreadCounts),
      Quantize("group_equals_single", {kGroup},
               "run_group gives the bytes that run gives for each linear.", GroupEqualsSingle),
      Quantize("not_worse_than_plain_rounding", {kQuality},
               "On a layer with outliers the error is not above that of plain rounding at equal "
               "bits.",
               NotWorseThanPlain),
  };
}

}  // namespace quantmill::check
