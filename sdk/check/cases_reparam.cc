// Cases of qm.reparametrize/1: what fresh parameters do, and derivatives against differences.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "core/formats/distortion.h"
#include "sdk/check/case.h"
#include "sdk/check/option_variants.h"
#include "sdk/check/packed_samples.h"
#include "sdk/check/reparam_call.h"

namespace quantmill::check {
namespace {

constexpr char kIdentity[] = "QM-C-008";
constexpr char kVjp[] = "QM-C-009";
constexpr char kFinalize[] = "QM-C-010";
constexpr char kParams[] = "QM-C-013";
constexpr int64_t kRows = 24;

Tensor CopyInF32(const Tensor& tensor) {
  return Tensor::FromF32(
      tensor.shape(),
      absl::MakeConstSpan(tensor.as<float>(), static_cast<size_t>(tensor.elements())));
}

Tensor NormalLike(const Shape& shape, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  Tensor out = *Tensor::Host(DType::kF32, shape);
  for (int64_t i = 0; i < out.elements(); ++i) out.as<float>()[i] = normal(random);
  return out;
}

double Dot(const Tensor& a, const Tensor& b) {
  double sum = 0.0;
  for (int64_t i = 0; i < a.elements(); ++i) {
    sum += static_cast<double>(a.as<float>()[i]) * b.as<float>()[i];
  }
  return sum;
}

double Norm(const Tensor& a) { return std::sqrt(Dot(a, a)); }

// Root mean square; 1 for zeros.
double Magnitude(const Tensor& a) {
  const double rms = Norm(a) / std::sqrt(static_cast<double>(std::max<int64_t>(a.elements(), 1)));
  return rms > 0.0 ? rms : 1.0;
}

Tensor Moved(const Tensor& from, const Tensor& direction, double step) {
  Tensor out = CopyInF32(from);
  for (int64_t i = 0; i < out.elements(); ++i) {
    out.as<float>()[i] += static_cast<float>(step * direction.as<float>()[i]);
  }
  return out;
}

// Fresh parameters are often a point where derivatives vanish: step away by a twentieth.
void LeaveInit(Subject& subject, Reparametrized* model) {
  uint64_t seed = subject.seed + 17;
  for (Reparametrized::Param& param : model->params) {
    if (!param.trainable) continue;
    const Tensor direction = NormalLike(param.shape, seed++);
    param.value = Moved(param.value, direction, 0.05 * Magnitude(param.value));
  }
}

std::optional<Verdict> Start(Subject& subject, bool leave_init, Reparametrized* model) {
  if (auto verdict = Reparametrize(subject, model)) return verdict;
  if (leave_init) LeaveInit(subject, model);
  return std::nullopt;
}

// ---- fresh parameters ----

Verdict IdentityAtInit(Subject& subject) {
  Reparametrized model;
  if (auto verdict = Start(subject, /*leave_init=*/false, &model)) return *verdict;
  const Tensor in = model.BaseInput(kRows);
  ForwardResult result;
  if (auto verdict = Forward(subject, model, in, &result)) return *verdict;
  double nmse = 0.0;
  if (model.kind == QM_REPARAM_DELTA) {
    const Tensor base = *Tensor::HostZeros(DType::kF32, result.out.shape());
    nmse = MeasureDistortion(base, result.out)->nmse();  // infinite unless all is 0
  } else {
    nmse = MeasureDistortion(in, result.out)->nmse();
  }
  constexpr double kRounding = 0x1p-40;  // 2^-20 relative: a few roundings in f32
  if (nmse <= kRounding) return Passed(absl::StrFormat("NMSE %.3g", nmse));
  const std::string text = absl::StrFormat(
      "forward with the parameters of init differs from the base: NMSE %.3g; training starts from "
      "another model than the one given",
      nmse);
  // Fake quantization differs by design.
  return model.kind == QM_REPARAM_WEIGHT
             ? Warning(kIdentity, text + " (say so in the method's summary)")
             : Failed(kIdentity, text);
}

// ---- purity ----

bool SameBytes(const Tensor& a, const Tensor& b) {
  return a.bytes() == b.bytes() &&
         std::memcmp(a.data(), b.data(), static_cast<size_t>(a.bytes())) == 0;
}

Verdict ReparamIsPure(Subject& subject) {
  Reparametrized model;
  if (auto verdict = Start(subject, /*leave_init=*/true, &model)) return *verdict;
  const Tensor in = model.BaseInput(kRows);
  const Tensor other = NormalLike(in.shape(), subject.seed + 3);
  ForwardResult first, between, again;
  if (auto verdict = Forward(subject, model, in, &first)) return *verdict;
  if (auto verdict = Forward(subject, model, other, &between)) return *verdict;
  if (auto verdict = Forward(subject, model, in, &again)) return *verdict;
  if (!SameBytes(first.out, again.out)) {
    return Failed(kVjp, "forward of the same input, with another in between, gave other bytes");
  }
  const Tensor d_out = NormalLike(first.out.shape(), subject.seed + 4);
  Gradients one, two;
  if (auto verdict = Vjp(subject, model, in, first.saved, d_out, 0, {}, &one)) return *verdict;
  if (auto verdict = Vjp(subject, model, in, again.saved, d_out, 0, {}, &two)) return *verdict;
  bool same = SameBytes(one.d_in, two.d_in);
  for (size_t i = 0; i < one.d_params.size(); ++i) {
    same = same && SameBytes(one.d_params[i], two.d_params[i]);
  }
  if (same) return Passed("forward and vjp give the same bytes again");
  return Failed(kVjp, "vjp of the same call gave other bytes the second time");
}

// Any number of rows; the saved bytes lie before a page that cannot be touched.
Verdict SavedWithinBound(Subject& subject) {
  Reparametrized model;
  if (auto verdict = Start(subject, /*leave_init=*/true, &model)) return *verdict;
  for (const int64_t rows : {int64_t{1}, int64_t{7}, kRows}) {
    const Tensor in = model.BaseInput(rows);
    ForwardResult result;
    if (auto verdict = Forward(subject, model, in, &result)) return *verdict;
    const Tensor d_out = NormalLike(result.out.shape(), subject.seed + 4);
    Gradients gradients;
    if (auto verdict =
            Vjp(subject, model, in, result.saved, d_out, 0, {/*d_in=*/false, {}}, &gradients)) {
      return *verdict;
    }
    ForwardResult bare;
    if (auto verdict = Forward(subject, model, in, &bare, /*keep=*/false)) return *verdict;
    if (SameBytes(result.out, bare.out)) continue;
    return Failed(kVjp, "forward without saved bytes gave another result than with them");
  }
  return Passed(
      absl::StrCat(model.saved_bytes_fixed, " bytes and ", model.saved_bytes_per_row, " per row"));
}

// ---- derivatives ----

// <d_out, forward> in f64.
std::optional<Verdict> Loss(Subject& subject, const Reparametrized& model, const Tensor& in,
                            const Tensor& d_out, double* out) {
  ForwardResult result;
  if (auto verdict = Forward(subject, model, in, &result)) return verdict;
  *out = Dot(d_out, result.out);
  return std::nullopt;
}

// A tensor that forward depends on: the input (index -1) or a parameter.
struct Variable {
  int index = -1;
  std::string name;
};

Tensor& ValueOf(const Variable& variable, Reparametrized* model, Tensor* in) {
  return variable.index < 0 ? *in : model->params[static_cast<size_t>(variable.index)].value;
}

// (L(v + h d) - L(v - h d)) / 2h.
std::optional<Verdict> Difference(Subject& subject, const Reparametrized& at, const Tensor& in,
                                  const Variable& variable, const Tensor& direction, double step,
                                  const Tensor& d_out, double* out) {
  double loss[2] = {0.0, 0.0};
  for (const int side : {0, 1}) {
    Reparametrized model = at;
    Tensor moved_in = in;
    Tensor& value = ValueOf(variable, &model, &moved_in);
    value = Moved(value, direction, side == 0 ? step : -step);
    if (auto verdict = Loss(subject, model, moved_in, d_out, &loss[side])) return verdict;
  }
  *out = (loss[0] - loss[1]) / (2.0 * step);
  return std::nullopt;
}

// What rounding in f32 does to a difference of losses: sums of K terms, `terms` of them added.
double DifferenceNoise(const Reparametrized& model, const Tensor& out, const Tensor& d_out,
                       double step) {
  double energy = 0.0;
  for (int64_t i = 0; i < out.elements(); ++i) {
    const double term = static_cast<double>(out.as<float>()[i]) * d_out.as<float>()[i];
    energy += term * term;
  }
  const double inner = static_cast<double>(model.layer.weight.dim(1));
  return 8.0 * 0x1p-24 * std::sqrt(inner) * std::sqrt(energy) / step;
}

enum class Agreement { kYes, kNo, kNotSmooth };

struct Comparison {
  Agreement agreement = Agreement::kYes;
  std::string text;
};

// Along one random direction: vjp against differences at two steps, extrapolated. Differences that
// do not settle belong to a function with steps (rounding), whose vjp is a convention. Two may
// agree by chance: before vjp is called wrong, a third step must agree as well.
std::optional<Verdict> CompareAlong(Subject& subject, const Reparametrized& model, const Tensor& in,
                                    const Variable& variable, const Tensor& gradient,
                                    const ForwardResult& at, const Tensor& d_out, uint64_t seed,
                                    Comparison* out) {
  Reparametrized copy = model;
  Tensor in_copy = in;
  const Tensor& value = ValueOf(variable, &copy, &in_copy);
  Tensor direction = NormalLike(value.shape(), seed);
  const double magnitude = Magnitude(value);
  for (int64_t i = 0; i < direction.elements(); ++i) {
    direction.as<float>()[i] *= static_cast<float>(magnitude);
  }
  constexpr double kStep = 1.0 / 64.0;
  double wide = 0.0, narrow = 0.0, narrowest = 0.0;
  if (auto v = Difference(subject, model, in, variable, direction, kStep, d_out, &wide)) return v;
  if (auto v = Difference(subject, model, in, variable, direction, kStep / 2, d_out, &narrow)) {
    return v;
  }
  const double expected = (4.0 * narrow - wide) / 3.0;
  const double seen = Dot(gradient, direction);
  const double noise = DifferenceNoise(model, at.out, d_out, kStep / 2);
  const double size = std::max(std::fabs(expected), Norm(gradient) * magnitude);
  out->text = absl::StrFormat("%s: vjp gives %.6g along a random direction, differences %.6g",
                              variable.name, seen, expected);
  if (std::fabs(wide - narrow) > 0.02 * size + noise) {
    out->agreement = Agreement::kNotSmooth;
    absl::StrAppend(&out->text, absl::StrFormat(" (%.6g and %.6g at two steps)", wide, narrow));
  } else if (!(std::fabs(seen - expected) <= 0.005 * size + noise)) {
    if (auto v =
            Difference(subject, model, in, variable, direction, kStep / 4, d_out, &narrowest)) {
      return v;
    }
    const bool settled = std::fabs(narrow - narrowest) <= 0.02 * size + 2.0 * noise;
    out->agreement = settled ? Agreement::kNo : Agreement::kNotSmooth;
  }
  return std::nullopt;
}

Verdict VjpMatchesDifferences(Subject& subject) {
  Reparametrized model;
  if (auto verdict = Start(subject, /*leave_init=*/true, &model)) return *verdict;
  const Tensor in = CopyInF32(model.BaseInput(kRows));
  ForwardResult at;
  if (auto verdict = Forward(subject, model, in, &at)) return *verdict;
  const Tensor d_out = NormalLike(at.out.shape(), subject.seed + 5);
  Gradients gradients;
  if (auto verdict = Vjp(subject, model, in, at.saved, d_out, 0, {}, &gradients)) return *verdict;
  std::vector<Variable> variables = {
      {-1, model.kind == QM_REPARAM_WEIGHT ? "the weight" : "the input"}};
  for (size_t i = 0; i < model.params.size(); ++i) {
    if (!model.params[i].trainable) continue;
    variables.push_back(
        {static_cast<int>(i), absl::StrCat("parameter '", model.params[i].name, "'")});
  }
  std::string seen, rough;
  for (const Variable& variable : variables) {
    const Tensor& gradient = variable.index < 0
                                 ? gradients.d_in
                                 : gradients.d_params[static_cast<size_t>(variable.index)];
    std::string wrong;
    bool smooth = true;
    for (const uint64_t direction : {100, 200}) {
      Comparison comparison;
      if (auto verdict = CompareAlong(subject, model, in, variable, gradient, at, d_out,
                                      subject.seed + direction, &comparison)) {
        return *verdict;
      }
      if (comparison.agreement == Agreement::kNo) wrong = comparison.text;
      if (comparison.agreement == Agreement::kNotSmooth) {
        rough = comparison.text;
        smooth = false;
      }
    }
    if (smooth && !wrong.empty()) return Failed(kVjp, wrong);
    absl::StrAppend(&seen, seen.empty() ? "" : ", ", variable.name);
  }
  if (rough.empty()) return Passed(seen);
  return Warning(kVjp, "forward has steps, so vjp cannot be compared with differences; " + rough);
}

// Gradients are added to what is there: bytes 0x3F are the float 0.747.
Verdict VjpAccumulates(Subject& subject) {
  constexpr uint8_t kFill = 0x3F;
  Reparametrized model;
  if (auto verdict = Start(subject, /*leave_init=*/true, &model)) return *verdict;
  const Tensor in = model.BaseInput(kRows);
  ForwardResult at;
  if (auto verdict = Forward(subject, model, in, &at)) return *verdict;
  const Tensor d_out = NormalLike(at.out.shape(), subject.seed + 5);
  Gradients zero, filled;
  if (auto v = Vjp(subject, model, in, at.saved, d_out, 0, {}, &zero)) return *v;
  if (auto v = Vjp(subject, model, in, at.saved, d_out, kFill, {}, &filled)) return *v;
  float start = 0.0f;
  std::memset(&start, kFill, sizeof start);
  const auto differs = [&](const Tensor& from_zero, const Tensor& from_start) {
    const double bound = 1e-4 * (Magnitude(from_zero) + start);
    for (int64_t i = 0; i < from_zero.elements(); ++i) {
      const double expected = static_cast<double>(from_zero.as<float>()[i]) + start;
      if (!(std::fabs(from_start.as<float>()[i] - expected) <= bound)) return true;
    }
    return false;
  };
  if (differs(zero.d_in, filled.d_in)) return Failed(kVjp, "d_in is overwritten, not added to");
  for (size_t i = 0; i < model.params.size(); ++i) {
    if (!model.params[i].trainable || !differs(zero.d_params[i], filled.d_params[i])) continue;
    return Failed(kVjp, absl::StrCat("the gradient of '", model.params[i].name,
                                     "' is overwritten, not added to"));
  }
  return Passed();
}

// Whatever is not asked for, what is asked for has the bytes it has when all is.
Verdict UnwantedGradients(Subject& subject) {
  Reparametrized model;
  if (auto verdict = Start(subject, /*leave_init=*/true, &model)) return *verdict;
  const Tensor in = model.BaseInput(kRows);
  ForwardResult at;
  if (auto verdict = Forward(subject, model, in, &at)) return *verdict;
  const Tensor d_out = NormalLike(at.out.shape(), subject.seed + 5);
  Gradients all;
  if (auto verdict = Vjp(subject, model, in, at.saved, d_out, 0, {}, &all)) return *verdict;
  std::vector<bool> trainable;
  for (const Reparametrized::Param& param : model.params) trainable.push_back(param.trainable);
  const std::vector<bool> none(model.params.size(), false);
  std::vector<WantedGradients> choices = {{true, none}, {false, trainable}};
  for (size_t i = 0; i < trainable.size(); ++i) {
    if (!trainable[i]) continue;
    choices.push_back({true, trainable});
    choices.back().d_params[i] = false;
  }
  for (const WantedGradients& wanted : choices) {
    Gradients some;
    if (auto verdict = Vjp(subject, model, in, at.saved, d_out, 0, wanted, &some)) {
      return Verdict{verdict->state, verdict->rule,
                     "with gradients that are not wanted given as NULL: " + verdict->text};
    }
    bool same = !wanted.d_in || SameBytes(some.d_in, all.d_in);
    for (size_t i = 0; i < model.params.size(); ++i) {
      same = same && (!wanted.d_params[i] || SameBytes(some.d_params[i], all.d_params[i]));
    }
    if (!same) {
      return Failed(kVjp, "a gradient has other bytes when others are not wanted (NULL)");
    }
  }
  return Passed(absl::StrCat(choices.size(), " choices"));
}

// ---- plan and init ----

std::string PlanText(const Reparametrized& model) {
  std::string text = absl::StrCat("kind ", model.kind);
  for (const Reparametrized::Param& param : model.params) {
    absl::StrAppend(&text, ", '", param.name, "' ", param.shape.ToString());
  }
  return text;
}

// Names by which a host stores parameters, beside one another and in files of adapters.
std::optional<Verdict> CheckNames(const Reparametrized& model) {
  for (size_t i = 0; i < model.params.size(); ++i) {
    const std::string& name = model.params[i].name;
    const bool plain = !name.empty() && std::all_of(name.begin(), name.end(), [](char c) {
      return absl::ascii_isalnum(c) || c == '_' || c == '-';
    });
    if (!plain) {
      return Failed(kParams, absl::StrCat("the parameter name '", name,
                                          "' is not of letters, digits, _ and - alone"));
    }
    for (size_t k = 0; k < i; ++k) {
      if (model.params[k].name != name) continue;
      return Failed(kParams, absl::StrCat("two parameters are named '", name, "'"));
    }
  }
  return std::nullopt;
}

Verdict SameParamsInBothPhases(Subject& subject) {
  Reparametrized model;
  if (auto verdict = Reparametrize(subject, &model)) return *verdict;
  if (auto verdict = CheckNames(model)) return *verdict;
  const std::string first = PlanText(model);
  Reparametrized other;
  other.linear = model.linear;
  other.phase = QM_PHASE_END_TO_END;
  bool accepted = false;
  std::string outcome;
  if (auto verdict = PlanReparam(subject, &other, &accepted, &outcome)) return *verdict;
  if (!accepted) {
    if (absl::StrContains(outcome, "UNIMPLEMENTED")) return Passed("one phase: " + first);
    return Failed(kParams, "plan refuses the phase end-to-end, not with UNIMPLEMENTED: " + outcome);
  }
  if (PlanText(other) == first) return Passed(first);
  return Failed(kParams, absl::StrCat("in the phase block the plan has ", first,
                                      ", in the phase end-to-end ", PlanText(other)));
}

Verdict SameInitTwice(Subject& subject) {
  if ((subject.method->flags & QM_METHOD_DETERMINISTIC) == 0) {
    return Skipped("the method does not say that it is deterministic");
  }
  Reparametrized model;
  if (auto verdict = Reparametrize(subject, &model)) return *verdict;
  Reparametrized again = model;
  if (auto verdict = InitReparam(subject, &again)) return *verdict;
  for (size_t i = 0; i < model.params.size(); ++i) {
    if (SameBytes(model.params[i].value, again.params[i].value)) continue;
    return Failed("QM-P-011", absl::StrCat("init filled '", model.params[i].name,
                                           "' with other bytes the second time"));
  }
  return Passed();
}

// INPUT and DELTA: a packed slot has no dense weight to hand to init.
Verdict OverPackedBase(Subject& subject) {
  const absl::StatusOr<std::vector<PackedSample>> samples = AffineSamples(subject.seed);
  if (!samples.ok()) return Failed("", std::string(samples.status().message()));
  const PackedWeight& base = samples->front().packed;
  const int64_t rows = base.out_features, cols = base.in_features;
  Reparametrized model;
  model.linear = LinearInfo(rows, cols);
  bool accepted = false;
  std::string outcome;
  if (auto verdict = PlanReparam(subject, &model, &accepted, &outcome)) return *verdict;
  if (!accepted) return Skipped("plan() refuses a linear of " + samples->front().name);
  if (model.kind == QM_REPARAM_WEIGHT) return Skipped("of WEIGHT the host keeps the dense weight");
  auto layer = MakeSyntheticLayer(SyntheticKind::kGaussian, rows, cols, 2 * kRows, subject.seed);
  if (!layer.ok()) return Failed("", std::string(layer.status().message()));
  model.layer = *std::move(layer);
  model.base = base;
  if (auto verdict = PlanReparam(subject, &model, &accepted, &outcome)) return *verdict;
  if (!accepted) {
    return Failed(kParams, absl::StrCat("plan takes a dense linear of ", rows, "x", cols,
                                        " and refuses it packed: ", outcome));
  }
  if (auto verdict = InitReparam(subject, &model)) return *verdict;
  const Tensor in = model.BaseInput(kRows);
  ForwardResult packed, dense;
  if (auto verdict = Forward(subject, model, in, &packed)) return *verdict;
  model.base.reset();
  if (auto verdict = Forward(subject, model, in, &dense)) return *verdict;
  if (SameBytes(packed.out, dense.out)) return Passed(samples->front().name);
  return Failed(kParams,
                "forward of the same parameters gives another result over a packed base "
                "than over a dense one");
}

// ---- finalize ----

// a [rows, k] b[n, k]^T in f64, rounded.
Tensor ProductOf(const Tensor& a, const Tensor& b) {
  Tensor out = *Tensor::Host(DType::kF32, {a.dim(0), b.dim(0)});
  const int64_t inner = a.dim(1);
  for (int64_t r = 0; r < a.dim(0); ++r) {
    for (int64_t c = 0; c < b.dim(0); ++c) {
      double sum = 0.0;
      for (int64_t k = 0; k < inner; ++k) {
        sum += static_cast<double>(a.as<float>()[r * inner + k]) * b.as<float>()[c * inner + k];
      }
      out.as<float>()[r * b.dim(0) + c] = static_cast<float>(sum);
    }
  }
  return out;
}

Verdict FinalizeAgrees(Subject& subject) {
  Reparametrized model;
  if (auto verdict = Start(subject, /*leave_init=*/true, &model)) return *verdict;
  if (!QM_HAS(subject.Ext<qm_reparametrize>(QM_EXT_REPARAMETRIZE), finalize)) {
    return Skipped("no finalize");
  }
  const Tensor in = model.BaseInput(kRows);
  ForwardResult at;
  if (auto verdict = Forward(subject, model, in, &at)) return *verdict;
  Finalized final;
  if (auto verdict = Finalize(subject, model, &final)) return *verdict;
  Tensor expected = at.out, seen = final.weight;  // WEIGHT
  if (model.kind != QM_REPARAM_WEIGHT) {
    seen = ProductOf(in, final.weight);
    expected = model.kind == QM_REPARAM_INPUT ? ProductOf(at.out, model.layer.weight)
                                              : ProductOf(in, model.layer.weight);
    if (model.kind == QM_REPARAM_DELTA) expected = Moved(expected, at.out, 1.0);
  }
  const Distortion error = *MeasureDistortion(expected, seen);
  // Dense: sums of K terms in f32. Packed fake quantization: scales rounded to 16 bits move codes
  // that lie between two. A merged weight that is packed again is rounded.
  const double dense = 0x1p-24 * 8.0 * std::sqrt(static_cast<double>(model.layer.weight.dim(1)));
  const double bound = !final.packed ? dense * dense : model.kind == QM_REPARAM_WEIGHT ? 1e-3 : 0.1;
  const std::string text = absl::StrFormat(
      "%s of finalize against forward: NMSE %.3g, bound %.3g",
      model.kind == QM_REPARAM_WEIGHT ? "the weight" : "the output", error.nmse(), bound);
  return error.finite && error.nmse() <= bound ? Passed(text) : Failed(kFinalize, text);
}

// The case with the defaults, and with each other choice of options that are lists: a method may
// offer several kinds. Choices that plan refuses are passed over.
Verdict ForEachChoice(Subject& subject, Verdict (*run)(Subject&)) {
  Verdict result = run(subject);
  if (result.state == State::kFailed) return result;
  for (const OptionVariant& variant : OptionVariants(*subject.method, QM_OPT_ENUM)) {
    Subject chosen = subject;
    chosen.options = variant.values;
    const Verdict verdict = run(chosen);
    if (verdict.state == State::kSkipped) continue;
    const std::string text = absl::StrCat(variant.what, ": ", verdict.text);
    if (verdict.state == State::kFailed) return Failed(verdict.rule, text);
    if (result.state == State::kSkipped ||
        (result.state == State::kPassed && verdict.state == State::kWarning)) {
      result = {verdict.state, verdict.rule, text};
    } else if (result.state == State::kPassed) {
      absl::StrAppend(&result.text, result.text.empty() ? "" : "; ", text);
    }
  }
  return result;
}

Case Reparam(std::string name, std::vector<std::string> rules, std::string asserts,
             Verdict (*run)(Subject&)) {
  return {"reparam." + std::move(name),
          std::move(rules),
          std::move(asserts),
          Scope::kMethod,
          QM_EXT_REPARAMETRIZE,
          [run](Subject& subject) { return ForEachChoice(subject, run); },
          60,
          false};
}

}  // namespace

std::vector<Case> ReparamCases() {
  return {
      Reparam("identity_at_init", {kIdentity},
              "forward with the parameters of init leaves the base as it is.", IdentityAtInit),
      Reparam("pure", {kVjp}, "forward and vjp depend on their arguments alone.", ReparamIsPure),
      Reparam(
          "saved_within_bound", {kVjp, "QM-P-014"},
          "forward and vjp keep to the saved bytes of the plan, for 1, 7 and 24 rows, and forward "
          "does without.",
          SavedWithinBound),
      Reparam("vjp_matches_differences", {kVjp},
              "vjp agrees with central differences of forward, for the input and every trainable "
              "parameter.",
              VjpMatchesDifferences),
      Reparam("vjp_accumulates", {kVjp}, "vjp adds to the gradients it is given.", VjpAccumulates),
      Reparam("unwanted_gradients", {kVjp},
              "vjp takes NULL for the gradient of the input and for those of parameters, in place "
              "of what is not wanted.",
              UnwantedGradients),
      Reparam("same_params_in_both_phases", {kParams},
              "plan has the same parameters in both phases, with names that can be stored.",
              SameParamsInBothPhases),
      Reparam("same_init_twice", {"QM-P-011"},
              "A deterministic method fills the same parameters with the same seed.",
              SameInitTwice),
      Reparam("over_packed_base", {kParams},
              "INPUT and DELTA work over a packed base, of which forward and vjp see no tensors.",
              OverPackedBase),
      Reparam("finalize_agrees", {kFinalize}, "finalize gives the weight that forward acts as.",
              FinalizeAgrees),
  };
}

}  // namespace quantmill::check
