#include "sdk/check/reparam_call.h"

#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "sdk/check/checked_call.h"
#include "sdk/check/packed_samples.h"

namespace quantmill::check {
namespace {

constexpr char kResult[] = "QM-P-009";
constexpr uint64_t kMostParams = 64;

CallSetup ReparamSetup(const Subject& subject) {
  CallSetup setup;
  setup.options = subject.options.empty() ? DefaultOptions(*subject.method) : subject.options;
  setup.seed = subject.seed;
  return setup;
}

// Tensors of a packed base are there for init and finalize alone.
const qm_reparam_info* InfoInput(CheckedCall& call, const Reparametrized& model,
                                 bool with_base_tensors = false) {
  qm_reparam_info info = {};
  info.struct_size = sizeof info;
  info.linear = call.Struct("the qm_linear_info", model.linear);
  info.phase = model.phase;
  if (model.base) {
    PackedWeight base = *model.base;
    if (!with_base_tensors) base.tensors.clear();
    info.base = call.InputPacked(base);
  }
  return call.Struct("the qm_reparam_info", info);
}

std::vector<qm_named_tensor> ParamInputs(CheckedCall& call, const Reparametrized& model) {
  std::vector<qm_named_tensor> params;
  for (const Reparametrized::Param& param : model.params) {
    params.push_back({param.name.c_str(), call.Input("parameter " + param.name, param.value)});
  }
  return params;
}

std::vector<qm_named_tensor> ParamOutputs(CheckedCall& call, const Reparametrized& model) {
  std::vector<qm_named_tensor> params;
  for (const Reparametrized::Param& param : model.params) {
    params.push_back(
        {param.name.c_str(), call.Output("parameter " + param.name, DType::kF32, param.shape)});
  }
  return params;
}

std::optional<Verdict> CopyPlan(const qm_reparam_plan& plan, Reparametrized* out) {
  if (plan.kind < QM_REPARAM_WEIGHT || plan.kind > QM_REPARAM_DELTA) {
    return Failed(kContents, absl::StrCat("plan() gave the kind ", plan.kind,
                                          "; it is QM_REPARAM_WEIGHT, INPUT or DELTA"));
  }
  if (plan.param_count == 0 || plan.param_count > kMostParams || plan.params == nullptr ||
      (plan.stat_count > 0 && plan.stats == nullptr)) {
    return Failed(kContents, absl::StrCat("plan() lists ", plan.param_count, " parameters"));
  }
  out->kind = plan.kind;
  out->saved_bytes_per_row = plan.saved_bytes_per_row;
  out->saved_bytes_fixed = plan.saved_bytes_fixed;
  out->params.clear();
  out->stats = PlanAnswer();
  for (uint64_t i = 0; i < plan.param_count; ++i) {
    const qm_param& param = plan.params[i];
    if (param.name == nullptr || param.rank < 0 || param.rank > QM_MAX_RANK) {
      return Failed(kContents, absl::StrCat("parameter ", i, " has no name or no valid rank"));
    }
    if (param.dtype != QM_F32) {
      return Skipped(absl::StrCat("parameter '", param.name, "' is not F32"));
    }
    out->params.push_back({param.name,
                           Shape(absl::MakeConstSpan(param.shape, static_cast<size_t>(param.rank))),
                           (param.flags & QM_PARAM_TRAINABLE) != 0, Tensor()});
  }
  for (uint64_t i = 0; i < plan.stat_count; ++i) {
    const qm_stat_request& request = plan.stats[i];
    out->stats.stats.push_back({request.stat_id, request.max_rows, request.dtype, request.flags});
  }
  return std::nullopt;
}

}  // namespace

Tensor Reparametrized::BaseInput(int64_t rows) const {
  return kind == QM_REPARAM_WEIGHT ? layer.weight : layer.inputs.Rows(0, rows);
}

Shape Reparametrized::OutputShape(const Tensor& in) const {
  return kind == QM_REPARAM_DELTA ? Shape{in.dim(0), layer.weight.dim(0)} : in.shape();
}

std::optional<Verdict> PlanReparam(Subject& subject, Reparametrized* model, bool* accepted,
                                   std::string* outcome) {
  CheckedCall call(subject, ReparamSetup(subject));
  const qm_reparam_info* info = InfoInput(call, *model);
  qm_reparam_plan empty = {};
  empty.struct_size = sizeof empty;
  qm_reparam_plan* plan = call.Struct("the qm_reparam_plan", empty);
  const qm_status code = Invoke(call, ReparamTable(subject)->plan, info, plan);
  if (auto verdict = call.Finish(code)) return verdict;
  *accepted = code == QM_OK;
  *outcome = call.Outcome();
  return *accepted ? CopyPlan(*plan, model) : std::nullopt;
}

std::optional<Verdict> InitReparam(Subject& subject, Reparametrized* model) {
  CheckedCall call(subject, ReparamSetup(subject));
  const qm_reparam_info* info = InfoInput(call, *model, /*with_base_tensors=*/true);
  const qm_tensor weight = call.Input("the weight", model->layer.weight);
  const StatInputs stats(call, subject, model->layer, model->stats);
  std::vector<qm_named_tensor> params = ParamOutputs(call, *model);
  const qm_status code =
      Invoke(call, ReparamTable(subject)->init, info, model->base ? nullptr : &weight, stats.get(),
             params.data(), params.size());
  if (auto verdict = call.Finish(code)) return verdict;
  if (code != QM_OK) {
    return Failed("QM-P-012", absl::StrCat("plan accepted, init refused: ", call.Outcome()));
  }
  for (size_t i = 0; i < params.size(); ++i) {
    absl::StatusOr<Tensor> value = call.Read(params[i].tensor);
    if (!value.ok()) return Failed(kResult, std::string(value.status().message()));
    for (int64_t e = 0; e < value->elements(); ++e) {
      if (std::isfinite(value->as<float>()[e])) continue;
      return Failed(kContents, absl::StrCat("init left element ", e, " of parameter '",
                                            model->params[i].name, "' unset or not finite"));
    }
    model->params[i].value = *std::move(value);
  }
  return std::nullopt;
}

std::optional<Verdict> Reparametrize(Subject& subject, Reparametrized* out) {
  constexpr int64_t kShapes[][2] = {{48, 64}, {64, 128}, {128, 256}, {32, 512}, {256, 1024}};
  const auto* table = ReparamTable(subject);
  if (!QM_HAS(table, plan) || !QM_HAS(table, init) || !QM_HAS(table, forward) ||
      !QM_HAS(table, vjp)) {
    return Failed(kContents, "qm.reparametrize/1 needs plan, init, forward and vjp");
  }
  std::string refusal;
  for (const auto& [rows, cols] : kShapes) {
    out->linear = LinearInfo(rows, cols);
    bool accepted = false;
    if (auto verdict = PlanReparam(subject, out, &accepted, &refusal)) return verdict;
    if (!accepted) continue;
    auto layer = MakeSyntheticLayer(SyntheticKind::kGaussian, rows, cols, 2 * cols, subject.seed);
    if (!layer.ok()) return Failed("", std::string(layer.status().message()));
    out->layer = *std::move(layer);
    return InitReparam(subject, out);
  }
  return Skipped(absl::StrCat("plan() accepts no linear from 48 x 64 to 256 x 1024: ", refusal));
}

std::optional<Verdict> Forward(Subject& subject, const Reparametrized& model, const Tensor& in,
                               ForwardResult* out, bool keep) {
  CheckedCall call(subject, ReparamSetup(subject));
  const qm_reparam_info* info = InfoInput(call, model);
  const qm_tensor x = call.Input("the input", in);
  const std::vector<qm_named_tensor> params = ParamInputs(call, model);
  const int64_t bytes = static_cast<int64_t>(
      model.saved_bytes_fixed + model.saved_bytes_per_row * static_cast<uint64_t>(in.dim(0)));
  const qm_tensor saved = call.Output("the saved bytes", DType::kU8, {bytes});
  qm_tensor y = call.Output("the result", DType::kF32, model.OutputShape(in));
  const qm_status code = Invoke(call, ReparamTable(subject)->forward, info, &x, params.data(),
                                params.size(), keep ? saved.data : nullptr, &y);
  if (auto verdict = call.Finish(code)) return verdict;
  if (code != QM_OK) return Failed("QM-P-012", "plan accepted, forward refused: " + call.Outcome());
  absl::StatusOr<Tensor> result = call.Read(y);
  absl::StatusOr<Tensor> kept = call.Read(saved);
  if (!result.ok()) return Failed(kResult, std::string(result.status().message()));
  if (!kept.ok()) return Failed(kResult, std::string(kept.status().message()));
  *out = {*std::move(result), *std::move(kept)};
  return std::nullopt;
}

std::optional<Verdict> Vjp(Subject& subject, const Reparametrized& model, const Tensor& in,
                           const Tensor& saved, const Tensor& d_out, uint8_t fill,
                           const WantedGradients& wanted, Gradients* out) {
  CallSetup setup = ReparamSetup(subject);
  setup.fill = fill;
  CheckedCall call(subject, setup);
  const qm_reparam_info* info = InfoInput(call, model);
  const qm_tensor x = call.Input("the input", in);
  const std::vector<qm_named_tensor> params = ParamInputs(call, model);
  const qm_tensor kept = call.Input("the saved bytes", saved);
  const qm_tensor above = call.Input("d_out", d_out);
  qm_tensor d_in = call.Output("d_in", DType::kF32, in.shape());
  std::vector<qm_named_tensor> d_params = ParamOutputs(call, model);
  for (size_t i = 0; i < d_params.size(); ++i) {
    const bool want = wanted.d_params.empty() ? model.params[i].trainable : wanted.d_params[i];
    if (!want) d_params[i].tensor = {};
  }
  const qm_status code =
      Invoke(call, ReparamTable(subject)->vjp, info, &x, params.data(), params.size(), kept.data,
             &above, wanted.d_in ? &d_in : nullptr, d_params.data());
  if (auto verdict = call.Finish(code)) return verdict;
  if (code != QM_OK) return Failed("QM-P-012", "plan accepted, vjp refused: " + call.Outcome());
  out->d_params.clear();
  absl::StatusOr<Tensor> value = call.Read(d_in);
  if (!value.ok()) return Failed(kResult, std::string(value.status().message()));
  out->d_in = *std::move(value);
  for (size_t i = 0; i < d_params.size(); ++i) {
    value = d_params[i].tensor.data == nullptr
                ? Tensor::HostZeros(DType::kF32, model.params[i].shape)
                : call.Read(d_params[i].tensor);
    if (!value.ok()) return Failed(kResult, std::string(value.status().message()));
    out->d_params.push_back(*std::move(value));
  }
  return std::nullopt;
}

std::optional<Verdict> Finalize(Subject& subject, const Reparametrized& model, Finalized* out) {
  CheckedCall call(subject, ReparamSetup(subject));
  const qm_reparam_info* info = InfoInput(call, model, /*with_base_tensors=*/true);
  const qm_tensor weight = call.Input("the weight", model.layer.weight);
  const std::vector<qm_named_tensor> params = ParamInputs(call, model);
  qm_packed packed = {};
  const qm_status code = Invoke(call, ReparamTable(subject)->finalize, info, &weight, params.data(),
                                params.size(), &packed);
  // What *packed points at dies with the call.
  out->packed = code == QM_OK && packed.format_id != nullptr;
  if (auto verdict = call.Finish(code)) return verdict;
  if (code != QM_OK)
    return Failed("QM-P-012", "plan accepted, finalize refused: " + call.Outcome());
  if (out->packed) {
    absl::StatusOr<PackedWeight> taken = call.TakePacked(packed);
    if (!taken.ok()) return Failed(kResult, std::string(taken.status().message()));
    absl::StatusOr<Tensor> dense = DequantizeOnHost(subject, *taken);
    if (!dense.ok()) return Skipped(std::string(dense.status().message()));
    out->weight = *std::move(dense);
    return std::nullopt;
  }
  absl::StatusOr<std::vector<NamedTensor>> emitted = call.Emitted();
  if (!emitted.ok()) return Failed(kResult, std::string(emitted.status().message()));
  for (NamedTensor& named : *emitted) {
    if (named.name != "weight") continue;
    if (!(named.tensor.shape() == model.layer.weight.shape()) ||
        named.tensor.dtype() != DType::kF32) {
      return Failed(kContents, "finalize emitted a 'weight' of another shape or dtype");
    }
    out->weight = std::move(named.tensor);
    return std::nullopt;
  }
  return Failed(kResult, "finalize neither emitted a 'weight' nor described a packed result");
}

}  // namespace quantmill::check
