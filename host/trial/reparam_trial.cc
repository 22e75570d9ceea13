// TrialSession::CallReparam: a call of a training once more.
#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/clock.h"
#include "core/base/status.h"
#include "host/trial/session.h"

namespace quantmill {
namespace {

absl::StatusOr<std::vector<NamedTensor>> OnDevice(const std::vector<NamedTensor>& host,
                                                  Backend& backend) {
  std::vector<NamedTensor> tensors;
  for (const NamedTensor& named : host) {
    QM_ASSIGN_OR_RETURN(Tensor tensor, backend.ToDevice(named.tensor));
    tensors.push_back({named.name, std::move(tensor)});
  }
  return tensors;
}

// The inputs of a call on a backend; empty tensors stay empty.
absl::StatusOr<ReparamInputs> InputsOnDevice(const ReparamInputs& host, Backend& backend) {
  ReparamInputs inputs = host;
  for (Tensor* tensor : {&inputs.weight, &inputs.in, &inputs.saved, &inputs.d_out}) {
    if (tensor->empty()) continue;
    QM_ASSIGN_OR_RETURN(*tensor, backend.ToDevice(*tensor));
  }
  QM_ASSIGN_OR_RETURN(inputs.params, OnDevice(host.params, backend));
  return inputs;
}

absl::StatusOr<Tensor> ZerosOn(Backend& backend, DType dtype, const Shape& shape) {
  QM_ASSIGN_OR_RETURN(Tensor tensor, backend.Allocate(dtype, shape));
  QM_RETURN_IF_ERROR(backend.Zero(&tensor));
  return tensor;
}

absl::Status CountNotFinite(const Tensor& tensor, Backend& backend, int64_t* count) {
  if (tensor.empty()) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(DType::kF32, tensor.shape()));
  QM_RETURN_IF_ERROR(backend.Copy(tensor, &host));
  *count += std::count_if(host.as<float>(), host.as<float>() + host.elements(),
                          [](float value) { return !std::isfinite(value); });
  return absl::OkStatus();
}

// One call of a function; its results are appended to *results.
class ReparamReplay {
 public:
  ReparamReplay(ReparamCalls& calls, const ReparamSubject& subject, const ReparamPlan& plan,
                const ReparamInputs& inputs)
      : calls_(calls), backend_(calls.backend()), subject_(subject), plan_(plan), inputs_(inputs) {}

  absl::Status Call(const std::string& function, std::vector<Tensor>* results) {
    if (function == "reparametrize.init") return Init(results);
    if (function == "reparametrize.forward") return Forward(results);
    if (function == "reparametrize.vjp") return Vjp(results);
    return Finalize(results);
  }

 private:
  absl::Status Init(std::vector<Tensor>* results) {
    QM_ASSIGN_OR_RETURN(const ReparamCalls::Start start,
                        calls_.Init(subject_, plan_, inputs_.weight));
    for (const NamedTensor& param : start.params) results->push_back(param.tensor);
    results->push_back(start.weight);
    return absl::OkStatus();
  }

  absl::Status Forward(std::vector<Tensor>* results) {
    Tensor saved;
    const int64_t bytes = static_cast<int64_t>(plan_.SavedBytes(inputs_.in.dim(0)));
    if (inputs_.keeps_saved && bytes > 0) {
      QM_ASSIGN_OR_RETURN(saved, backend_.Allocate(DType::kU8, {bytes}));
    }
    QM_ASSIGN_OR_RETURN(Tensor out, backend_.Allocate(inputs_.out_dtype, inputs_.out_shape));
    QM_RETURN_IF_ERROR(calls_.Forward(subject_, inputs_.in, inputs_.params,
                                      saved.empty() ? nullptr : &saved, &out));
    results->push_back(out);
    return absl::OkStatus();
  }

  // The plugin may have been built anew since: what forward saved is then of no use.
  absl::Status CheckSaved() const {
    const int64_t now = static_cast<int64_t>(plan_.SavedBytes(inputs_.in.dim(0)));
    const int64_t then = inputs_.saved.empty() ? 0 : inputs_.saved.bytes();
    if (now == then) return absl::OkStatus();
    return absl::FailedPreconditionError(
        ErrorText(absl::StrCat("plan() wants ", now, " saved bytes"),
                  absl::StrCat("the failed call had ", then), "run the pipeline again"));
  }

  absl::Status Vjp(std::vector<Tensor>* results) {
    QM_RETURN_IF_ERROR(CheckSaved());
    Tensor d_in;
    if (inputs_.wants_d_in) {
      QM_ASSIGN_OR_RETURN(d_in, ZerosOn(backend_, DType::kF32, inputs_.in.shape()));
    }
    std::vector<NamedTensor> d_params;
    for (const NamedTensor& param : inputs_.params) {
      NamedTensor& d_param = d_params.emplace_back();
      d_param.name = param.name;
      const auto& wanted = inputs_.wanted;
      if (std::find(wanted.begin(), wanted.end(), param.name) == wanted.end()) continue;
      QM_ASSIGN_OR_RETURN(d_param.tensor, ZerosOn(backend_, DType::kF32, param.tensor.shape()));
    }
    QM_RETURN_IF_ERROR(calls_.Vjp(subject_, inputs_.in, inputs_.params, inputs_.saved,
                                  inputs_.d_out, d_in.empty() ? nullptr : &d_in, d_params));
    results->push_back(d_in);
    for (const NamedTensor& d_param : d_params) results->push_back(d_param.tensor);
    return absl::OkStatus();
  }

  absl::Status Finalize(std::vector<Tensor>* results) {
    QM_ASSIGN_OR_RETURN(const ReparamCalls::Folded folded,
                        calls_.Finalize(subject_, plan_, inputs_.weight, inputs_.params));
    results->push_back(folded.dense);
    return absl::OkStatus();
  }

  ReparamCalls& calls_;
  Backend& backend_;
  const ReparamSubject& subject_;
  const ReparamPlan& plan_;
  const ReparamInputs& inputs_;
};

}  // namespace

absl::StatusOr<TrialResult> TrialSession::CallReparam(const ReparamTrial& trial) {
  const BundledReparam& call = *trial.call;
  ReparamSubject subject;
  subject.method = &method_;
  subject.stage = trial.stage;
  subject.slot = &call.slot;
  subject.options = &trial.options;
  subject.weight_dtype = call.weight_dtype;
  subject.scale_dtype = call.scale_dtype;
  subject.seed = trial.seed;
  subject.phase = call.phase;
  if (call.base != nullptr) {
    PackedWeight base = *call.base;
    QM_ASSIGN_OR_RETURN(base.tensors, OnDevice(call.base->tensors, *backend_));
    subject.base = std::make_shared<const PackedWeight>(std::move(base));
  }
  QM_ASSIGN_OR_RETURN(const std::optional<ReparamPlan> plan, training_->Plan(subject));
  if (call.plans()) return TrialResult();
  if (!plan) {
    return absl::FailedPreconditionError("plan() leaves this linear alone with these options");
  }
  QM_ASSIGN_OR_RETURN(const ReparamInputs inputs, InputsOnDevice(call.inputs, *backend_));
  std::vector<Tensor> results;
  const auto start = Clock::now();
  QM_RETURN_IF_ERROR(
      ReparamReplay(*training_, subject, *plan, inputs).Call(call.function, &results));
  QM_RETURN_IF_ERROR(backend_->Synchronize());
  TrialResult result;
  result.seconds = SecondsSince(start);
  result.not_finite = 0;
  for (const Tensor& tensor : results) {
    QM_RETURN_IF_ERROR(CountNotFinite(tensor, *backend_, &result.not_finite));
  }
  return result;
}

}  // namespace quantmill
