#include "sdk/check/quantize_attempt.h"

#include <cmath>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "sdk/check/packed_samples.h"

namespace quantmill::check {
namespace {

constexpr char kDefinedResult[] = "QM-C-001";

bool HasOption(const qm_method& method, std::string_view name) {
  for (uint64_t i = 0; i < method.option_count; ++i) {
    if (method.options[i].name == name) return true;
  }
  return false;
}

bool JudgedByOutput(const Attempt& attempt) {
  return AsksForStatistics(attempt) && attempt.layer.inputs.dim(0) > 0;
}

// Parameters, names, dtypes and shapes. *values holds the dense values afterwards, where a plugin
// here reads the format.
std::optional<Verdict> CheckContents(Subject& subject, Attempt* attempt) {
  const PackedWeight& packed = attempt->run.packed;
  const Tensor& weight = attempt->layer.weight;
  const auto wrong = [&](const std::string& why) {
    return Failed(kContents, absl::StrCat(attempt->what, ": ", why));
  };
  if (packed.out_features != weight.dim(0) || packed.in_features != weight.dim(1)) {
    return wrong(absl::StrCat("the result says it is [", packed.out_features, ", ",
                              packed.in_features, "]"));
  }
  if (packed.format_id != attempt->plan.format_id) {
    return wrong(absl::StrCat("plan announced ", attempt->plan.format_id, ", the result is ",
                              packed.format_id));
  }
  const absl::Status valid = subject.formats->Check(packed);
  if (!valid.ok() && valid.code() != absl::StatusCode::kNotFound) {
    return wrong(absl::StrCat("the result is not in its format: ", std::string(valid.message())));
  }
  absl::StatusOr<Tensor> values = DequantizeOnHost(subject, packed);
  attempt->values = values.ok() ? *std::move(values) : Tensor();
  return std::nullopt;
}

}  // namespace

std::string ShapeText(const SyntheticLayer& layer) {
  return absl::StrCat(layer.weight.dim(0), " x ", layer.weight.dim(1));
}

std::vector<std::pair<std::string, CallSetup>> Setups(const Subject& subject) {
  CallSetup setup;
  setup.options = DefaultOptions(*subject.method);
  setup.seed = subject.seed;
  std::vector<std::pair<std::string, CallSetup>> setups = {{"defaults", setup}};
  if (HasOption(*subject.method, "group_size")) {
    setup.options["group_size"] = "-1";
    setups.push_back({"group_size -1", setup});
  }
  return setups;
}

bool AsksForStatistics(const Attempt& attempt) { return !attempt.plan.stats.empty(); }

absl::StatusOr<double> ErrorOf(Subject& subject, const Attempt& attempt, const Tensor& values) {
  return JudgedByOutput(attempt) ? OutputNmse(*subject.host, attempt.layer, values)
                                 : WeightNmse(attempt.layer.weight, values);
}

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

std::optional<Verdict> StartAccepted(Subject& subject, SyntheticKind kind, int64_t out_features,
                                     int64_t rows, Attempt* attempt) {
  if (auto verdict = StartAccepted(subject, attempt)) return verdict;
  absl::StatusOr<SyntheticLayer> layer =
      MakeSyntheticLayer(kind, out_features, attempt->layer.weight.dim(1), rows, subject.seed);
  if (!layer.ok()) return CheckerFailed(layer.status());
  attempt->layer = *std::move(layer);
  attempt->what = ShapeText(attempt->layer);
  return std::nullopt;
}

std::optional<Verdict> PlanAndRun(Subject& subject, Attempt* attempt) {
  attempt->info = LinearInfo(attempt->layer.weight.dim(0), attempt->layer.weight.dim(1));
  attempt->run = RunAnswer();
  attempt->values = Tensor();
  attempt->plan = Plan(subject, attempt->info, attempt->setup);
  if (attempt->plan.violation) return attempt->plan.violation;
  if (attempt->plan.code != QM_OK) return std::nullopt;
  attempt->run = Run(subject, attempt->layer, attempt->info, attempt->plan, attempt->setup);
  return attempt->run.violation;
}

std::optional<Verdict> CheckResult(Subject& subject, Attempt* attempt) {
  if (auto verdict = CheckContents(subject, attempt)) return verdict;
  if (attempt->values.empty()) return std::nullopt;
  const float* values = attempt->values.as<float>();
  for (int64_t i = 0; i < attempt->values.elements(); ++i) {
    if (std::isfinite(values[i])) continue;
    return Failed(kDefinedResult,
                  absl::StrFormat("%s: value %d of the result is %g", attempt->what, i, values[i]));
  }
  for (const float x : absl::MakeConstSpan(attempt->layer.inputs.as<float>(),
                                           static_cast<size_t>(attempt->layer.inputs.elements()))) {
    if (!std::isfinite(x)) return std::nullopt;  // there is no error to speak of
  }
  const absl::StatusOr<double> nmse = ErrorOf(subject, *attempt, attempt->values);
  if (!nmse.ok()) return CheckerFailed(nmse.status());
  if (*nmse <= 1.0) return std::nullopt;
  const char* of = JudgedByOutput(*attempt) ? "output" : "weight";
  return Failed(kDefinedResult,
                absl::StrFormat("%s: the %s's error has %.3g times the energy of the %s "
                                "itself; a result of zeros would be closer",
                                attempt->what, of, *nmse, of));
}

std::optional<Verdict> Try(Subject& subject, Attempt* attempt) {
  if (auto verdict = PlanAndRun(subject, attempt)) return verdict;
  if (attempt->plan.code != QM_OK || attempt->run.code != QM_OK) return std::nullopt;
  return CheckResult(subject, attempt);
}

std::optional<Verdict> WantResult(const Attempt& attempt) {
  if (attempt.plan.code != QM_OK) return Skipped("refused by plan: " + attempt.plan.outcome);
  if (attempt.run.code == QM_OK) return std::nullopt;
  return Failed(kPlanRefuses,
                absl::StrCat(attempt.what, ": plan accepted, run refused: ", attempt.run.outcome));
}

Verdict CheckerFailed(const absl::Status& status) {
  return Failed("", absl::StrCat("the checker itself failed: ", std::string(status.message())));
}

}  // namespace quantmill::check
