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
#include "sdk/check/quantize_attempt.h"
#include "sdk/check/quantize_call.h"
#include "sdk/check/synthetic.h"

namespace quantmill::check {
namespace {

constexpr char kDefined[] = "QM-C-001";
constexpr char kQuality[] = "QM-C-002";
constexpr char kGroup[] = "QM-C-003";
constexpr char kCancel[] = "QM-P-008";
constexpr char kDeterministic[] = "QM-P-011";

// ---- shapes ----

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
      if (!layer.ok()) return CheckerFailed(layer.status());
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
  if (!layer.ok()) return CheckerFailed(layer.status());
  attempt.layer = *std::move(layer);
  attempt.what = ShapeText(attempt.layer);
  if (auto verdict = Try(subject, &attempt)) return *verdict;
  if (auto verdict = WantResult(attempt)) return *verdict;
  return Passed(absl::StrFormat("%.2f s, %.3f bits per weight", attempt.run.seconds,
                                attempt.run.packed.BitsPerWeight()));
}

// ---- values ----

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
  return Failed(kDefined, absl::StrCat(change_name, " must be quantized; ", verdict.text));
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

// What a broken training leaves behind; beyond the range of 16-bit scales, and of squares in f32.
Verdict HugeWeights(Subject& subject) {
  std::string seen;
  for (const float huge : {1e4f, -1e30f}) {
    const std::string what = absl::StrFormat("a weight of %g", huge);
    const auto change = [huge](SyntheticLayer* layer) {
      layer->weight.as<float>()[layer->weight.elements() / 2 + 3] = huge;
    };
    // The first fits 16-bit scales.
    Verdict verdict =
        huge == 1e4f ? MustQuantize(subject, what, change) : TryChanged(subject, what, change);
    if (verdict.state != State::kPassed) return verdict;
    absl::StrAppend(&seen, seen.empty() ? "" : "; ", what, ": ", verdict.text);
  }
  return Passed(seen);
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
  std::string seen;
  for (const float value :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    attempt.layer.inputs.as<float>()[0] = value;
    attempt.what = absl::StrFormat("an input of %g", value);
    if (auto verdict = Try(subject, &attempt)) return *verdict;
    const bool refused = attempt.run.code != QM_OK;
    absl::StrAppend(&seen, seen.empty() ? "" : "; ", attempt.what, ": ",
                    refused ? attempt.run.outcome : "a defined result");
  }
  return Passed(seen);
}

// ---- statistics ----

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

// ---- promises of the call ----

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

Verdict CancelInTime(Subject& subject) {
  constexpr double kSeconds = 2.0;
  Attempt attempt;
  if (auto verdict = StartAccepted(subject, SyntheticKind::kOutlierChannels, 512, 64, &attempt)) {
    return *verdict;
  }
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
  if (auto verdict = StartAccepted(subject, SyntheticKind::kCorrelatedInputs, 96, 300, &attempt)) {
    return *verdict;
  }
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
  if (auto verdict = StartAccepted(subject, SyntheticKind::kCorrelatedInputs, 96, 300, &attempt)) {
    return *verdict;
  }
  std::optional<PackedWeight> first;
  for (const int threads : {1, 2, 5}) {
    auto backend = MakeCpuBackend(threads);
    if (!backend.ok()) return CheckerFailed(backend.status());
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

// ---- run_group ----

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
    if (!layer.ok()) return CheckerFailed(layer.status());
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

// ---- quality ----

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
  if (auto verdict = StartAccepted(subject, SyntheticKind::kOutlierChannels, 64, 1024, &attempt)) {
    return *verdict;
  }
  if (auto verdict = Try(subject, &attempt)) return *verdict;
  if (auto verdict = WantResult(attempt)) return *verdict;
  if (attempt.values.empty()) {
    return Skipped(absl::StrCat("no plugin here reads ", attempt.run.packed.format_id,
                                "; name its plugin with --plugin"));
  }
  const absl::StatusOr<double> error = ErrorOf(subject, attempt, attempt.values);
  if (!error.ok()) return CheckerFailed(error.status());
  std::string rule;
  const absl::StatusOr<double> plain = PlainError(subject, attempt, &rule);
  if (!plain.ok()) return CheckerFailed(plain.status());
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
      Quantize("huge_weights", {kDefined},
               "A weight of 1e4 gives a defined result; one of -1e30, too, or a refusal with text.",
               HugeWeights),
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
               CancelInTime),
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
