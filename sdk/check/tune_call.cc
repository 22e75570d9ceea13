#include "sdk/check/tune_call.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "sdk/check/option_variants.h"
#include "sdk/check/packed_samples.h"
#include "sdk/check/quantize_attempt.h"
#include "sdk/check/quantize_call.h"

namespace quantmill::check {
namespace {

constexpr char kTuneResult[] = "QM-C-012";
constexpr uint64_t kMostTuneEdits = 1024;
constexpr uint64_t kItemsBehind = 4;  // looked at behind those of the linears

const qm_block_tune* TuneTable(const Subject& subject) {
  return subject.Ext<qm_block_tune>(QM_EXT_BLOCK_TUNE);
}

// The code and text of plan(); QM_UNIMPLEMENTED: these options want no tuning.
struct TunePlanAnswer {
  qm_status code = QM_OK;
  std::string outcome;
  std::optional<Verdict> violation;
  uint64_t scratch_bytes = 0;
};

TunePlanAnswer PlanTuning(Subject& subject, const SyntheticBlock& block, const CallSetup& setup) {
  TunePlanAnswer answer;
  CheckedCall call(subject, setup);
  BlockCall raw(call, block, *subject.backend, BlockCall::Service::kNone);
  const BlockInput input(call, block, {/*weights=*/false, /*transforms=*/false});
  qm_quant_plan empty = {};
  empty.struct_size = sizeof empty;
  qm_quant_plan* plan = call.Struct("the qm_quant_plan", empty);
  answer.code = raw.Invoke(TuneTable(subject)->plan, input.get(), plan);
  answer.violation = call.Finish(answer.code);
  answer.outcome = call.Outcome();
  answer.scratch_bytes = plan->scratch_bytes;
  return answer;
}

std::optional<Verdict> FindTuningOptions(Subject& subject, PackedBlock* out) {
  std::string refusal;
  for (OptionVariant& variant : OptionVariants(*subject.method)) {
    out->setup.options = variant.values;
    const TunePlanAnswer plan = PlanTuning(subject, out->block, out->setup);
    if (plan.violation) return plan.violation;
    if (refusal.empty()) refusal = plan.outcome;
    if (plan.code != QM_OK) continue;
    out->options = variant.what;
    out->scratch_bytes = plan.scratch_bytes;
    return std::nullopt;
  }
  return Skipped(
      absl::StrCat("plan() takes no small block with the defaults nor with any one option "
                   "changed: ",
                   refusal));
}

// Every float stored moved by about a twentieth of itself: small layers are packed so well that
// nothing would be left to tune. As it was where the format does not allow that.
PackedWeight Disturbed(Subject& subject, PackedWeight packed) {
  constexpr float kPart = 0.05f;
  std::mt19937_64 random(subject.seed + static_cast<uint64_t>(packed.out_features));
  std::normal_distribution<float> normal;
  PackedWeight moved = packed;
  for (NamedTensor& named : moved.tensors) {
    if (!IsModelFloat(named.tensor.dtype())) continue;
    Tensor values = *Tensor::Host(DType::kF32, named.tensor.shape());
    Tensor stored = *Tensor::Host(named.tensor.dtype(), named.tensor.shape());
    if (!subject.host->Copy(named.tensor, &values).ok()) return packed;
    for (int64_t i = 0; i < values.elements(); ++i) {
      values.as<float>()[i] *= 1.0f + kPart * normal(random);
    }
    if (!subject.host->Copy(values, &stored).ok()) return packed;
    named.tensor = std::move(stored);
  }
  return subject.formats->Check(moved).ok() ? moved : packed;
}

std::optional<Verdict> PackLinear(Subject& subject, const SyntheticBlock::Linear& linear,
                                  PackedBlock* out) {
  qm_linear_info info = LinearInfo(linear.out, linear.in);
  info.name = linear.name.c_str();
  info.role = linear.role.c_str();
  info.input_group = linear.input_group;
  const PlanAnswer plan = Plan(subject, info, out->setup);
  if (plan.violation) return plan.violation;
  if (plan.code != QM_OK) {
    return Skipped(
        absl::StrCat("it packs no linear of ", linear.out, "x", linear.in, ": ", plan.outcome));
  }
  RunAnswer run = Run(subject, out->block.LayerOf(linear), info, plan, out->setup);
  if (run.violation) return run.violation;
  if (run.code != QM_OK) {
    return Failed("QM-P-012", absl::StrCat("plan accepted a linear of ", linear.out, "x", linear.in,
                                           ", run refused: ", run.outcome));
  }
  out->packed.push_back(Disturbed(subject, std::move(run.packed)));
  return std::nullopt;
}

// The packed weights as run() is given them, and behind them the norms.
const qm_packed* PackedInputs(CheckedCall& call, const PackedBlock& packed,
                              std::vector<qm_named_tensor>* norms) {
  std::vector<qm_packed> list;
  for (const PackedWeight& weight : packed.packed) {
    if (!weight.format_id.empty()) {
      list.push_back(*call.InputPacked(weight));
      continue;
    }
    list.push_back({});
    list.back().out_features = weight.out_features;
    list.back().in_features = weight.in_features;
  }
  for (const auto& [name, tensor] : packed.block.tensors()) {
    if (tensor.rank() == 1) norms->push_back({name.c_str(), call.Input(name, tensor)});
  }
  list.push_back({});
  list.back().tensors =
      call.Array<qm_named_tensor>("the list of norms", absl::MakeConstSpan(*norms));
  list.back().tensor_count = norms->size();
  return call.Array<qm_packed>("the packed linears", absl::MakeConstSpan(list));
}

// Everything that lives in the call's memory.
std::optional<Verdict> CopyTuned(CheckedCall& call, Subject& subject, uint64_t linears,
                                 const qm_edit* edits, uint64_t edit_count, TuneAnswer* answer) {
  for (uint64_t item = 0; item < linears + kItemsBehind; ++item) {
    auto emitted = call.Emitted(item);
    if (!emitted.ok()) return Failed("QM-P-009", std::string(emitted.status().message()));
    answer->emitted.push_back(*std::move(emitted));
  }
  if (edit_count > kMostTuneEdits || (edit_count > 0 && edits == nullptr)) {
    return Failed(kTuneResult, absl::StrCat("run lists ", edit_count, " edits",
                                            edits == nullptr ? " at NULL" : ""));
  }
  for (uint64_t i = 0; i < edit_count; ++i) {
    TuneAnswer::Edit edit;
    edit.kind = edits[i].kind;
    edit.target = edits[i].target == nullptr ? "" : edits[i].target;
    auto value = HostCopyOf(*subject.backend, edits[i].value, /*only_f32=*/true);
    edit.why = std::string(value.status().message());
    if (value.ok()) edit.value = *std::move(value);
    answer->edits.push_back(std::move(edit));
  }
  return std::nullopt;
}

bool IsAllFinite(const Tensor& f32) {
  return std::all_of(f32.as<float>(), f32.as<float>() + f32.elements(),
                     [](float value) { return std::isfinite(value); });
}

std::optional<Verdict> PutInPlace(const std::string& linear, const NamedTensor& fresh,
                                  PackedWeight* weight) {
  const auto place = std::find_if(weight->tensors.begin(), weight->tensors.end(),
                                  [&](const NamedTensor& t) { return t.name == fresh.name; });
  if (place == weight->tensors.end()) {
    return Failed(kTuneResult, absl::StrCat(linear, ": it emitted '", fresh.name,
                                            "'; the packed weight has no such tensor"));
  }
  if (place->tensor.dtype() != fresh.tensor.dtype() ||
      !(place->tensor.shape() == fresh.tensor.shape())) {
    return Failed(kTuneResult,
                  absl::StrCat(linear, ": the emitted '", fresh.name, "' is ",
                               fresh.tensor.shape().ToString(), ", the tensor it replaces ",
                               place->tensor.shape().ToString(), "; dtype and shape must stay"));
  }
  place->tensor = fresh.tensor;
  return std::nullopt;
}

std::optional<Verdict> PutEdit(const TuneAnswer::Edit& edit, BlockTensors* tensors) {
  const std::string what = absl::StrCat("the edit of '", edit.target, "': ");
  if (edit.kind != QM_EDIT_REPLACE) {
    return Failed(kTuneResult, absl::StrCat(what, "its kind is ", edit.kind,
                                            "; a tuning has edits of QM_EDIT_REPLACE alone"));
  }
  if (!edit.why.empty()) return Failed(kTuneResult, what + edit.why);
  const auto found = tensors->find(edit.target);
  if (found == tensors->end() || found->second.rank() != 1) {
    return Failed(kTuneResult, what +
                                   "it names no norm or bias of the block; weights go out "
                                   "through emit");
  }
  if (!(found->second.shape() == edit.value.shape())) {
    return Failed(kTuneResult,
                  absl::StrCat(what, "its value has shape ", edit.value.shape().ToString(),
                               ", expected ", found->second.shape().ToString()));
  }
  if (!IsAllFinite(edit.value)) {
    return Failed(kTuneResult, what + "its value holds NaN or infinity");
  }
  found->second = edit.value;
  return std::nullopt;
}

}  // namespace

std::optional<Verdict> PackBlock(Subject& subject, PackedBlock* out) {
  if (subject.Ext<qm_quantize_linear>(QM_EXT_QUANTIZE_LINEAR) == nullptr) {
    return Failed(kTuneResult,
                  "qm.block-tune/1 stands beside qm.quantize-linear/1: it tunes what the method "
                  "itself has packed");
  }
  out->setup.seed = subject.seed;
  if (auto verdict = FindTuningOptions(subject, out)) return verdict;
  for (const SyntheticBlock::Linear& linear : out->block.linears()) {
    if (auto verdict = PackLinear(subject, linear, out)) return verdict;
  }
  return std::nullopt;
}

TuneAnswer Tune(Subject& subject, const PackedBlock& packed, const CallSetup& setup,
                BlockCall::Service service) {
  TuneAnswer answer;
  CheckedCall call(subject, setup);
  BlockCall raw(call, packed.block, *subject.backend, service);
  const BlockInput input(call, packed.block, {/*weights=*/true, /*transforms=*/false});
  std::vector<qm_named_tensor> norms;
  const qm_packed* given = PackedInputs(call, packed, &norms);
  const qm_edit* edits = nullptr;
  uint64_t edit_count = 0;
  answer.code = raw.Invoke(TuneTable(subject)->run, input.get(), given, &edits, &edit_count);
  answer.violation = call.Finish(answer.code);
  answer.outcome = call.Outcome();
  answer.scratch_calls = call.scratch_calls();
  answer.emit_calls = call.emit_calls();
  answer.progress_calls = call.progress_calls();
  answer.scratch_bytes = call.scratch_bytes();
  answer.seconds_since_cancel = call.seconds_since_cancel();
  if (answer.violation || answer.code != QM_OK) return answer;
  answer.violation = CopyTuned(call, subject, packed.packed.size(), edits, edit_count, &answer);
  return answer;
}

std::optional<Verdict> TakeTuned(Subject& subject, const PackedBlock& packed,
                                 const TuneAnswer& answer, TunedBlock* out) {
  out->packed = packed.packed;
  out->tensors = packed.block.tensors();
  const auto& linears = packed.block.linears();
  for (size_t item = 0; item < answer.emitted.size(); ++item) {
    for (const NamedTensor& fresh : answer.emitted[item]) {
      if (item >= linears.size()) {
        return Failed(kTuneResult, absl::StrCat("it emitted '", fresh.name, "' for item ", item,
                                                "; the block has ", linears.size(), " linears"));
      }
      if (auto bad = PutInPlace(linears[item].name, fresh, &out->packed[item])) return bad;
    }
  }
  for (size_t i = 0; i < linears.size(); ++i) {
    if (out->packed[i].format_id.empty()) continue;  // left dense
    const absl::Status valid = subject.formats->Check(out->packed[i]);
    if (!valid.ok() && valid.code() != absl::StatusCode::kNotFound) {
      return Failed(kContents, absl::StrCat(linears[i].name, ", tuned, is not in its format: ",
                                            std::string(valid.message())));
    }
    absl::StatusOr<Tensor> dense = DequantizeOnHost(subject, out->packed[i]);
    if (!dense.ok()) return Skipped(std::string(dense.status().message()));
    if (!IsAllFinite(*dense)) {
      return Failed(kTuneResult, linears[i].name + ", tuned, holds NaN or infinity");
    }
    out->tensors[linears[i].weight()] = *std::move(dense);
  }
  for (const TuneAnswer::Edit& edit : answer.edits) {
    if (auto bad = PutEdit(edit, &out->tensors)) return bad;
  }
  return std::nullopt;
}

}  // namespace quantmill::check
