#include "host/worker/block_service.h"

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/calib/block_trials.h"
#include "host/worker/services.h"
#include "host/worker/tensor_view.h"

namespace quantmill {
namespace {

constexpr uint64_t kMaxOverrides = 1 << 20;

qm_status FromStatus(qm_call* call, const char* function, const absl::Status& status) {
  if (status.ok()) return QM_OK;
  return call->fail(call, static_cast<qm_status>(status.code()),
                    absl::StrCat(function, ": ", status.message()).c_str());
}

absl::StatusOr<std::vector<TensorOverride>> ReadOverrides(const CallContext& context,
                                                          const qm_override* overrides,
                                                          uint64_t count) {
  if (count > kMaxOverrides || (count > 0 && overrides == nullptr)) {
    return absl::InvalidArgumentError(absl::StrCat(count, " overrides were counted, none given"));
  }
  std::vector<TensorOverride> result;
  for (uint64_t i = 0; i < count; ++i) {
    if (overrides[i].tensor == nullptr) {
      return absl::InvalidArgumentError("an override names no tensor");
    }
    TensorOverride item;
    item.name = overrides[i].tensor;
    absl::StatusOr<Tensor> value = BorrowTensor(overrides[i].value, context.backend->device());
    if (!value.ok()) return WithContext(value.status(), item.name);
    item.value = *std::move(value);
    result.push_back(std::move(item));
  }
  return result;
}

// A tensor of the plugin's that must lie on the call's device, writable unless marked.
absl::StatusOr<Tensor> OnDevice(const CallContext& context, const qm_tensor& view) {
  QM_ASSIGN_OR_RETURN(const Tensor tensor, BorrowTensor(view, context.backend->device()));
  if (tensor.device() == context.backend->device()) {
    return Tensor(nullptr, tensor.data(), tensor.dtype(), tensor.shape(), tensor.device(),
                  (view.flags & QM_TENSOR_READONLY) != 0);
  }
  return absl::InvalidArgumentError(absl::StrCat("it lies on ", DeviceName(tensor.device()),
                                                 ", the call runs on ",
                                                 DeviceName(context.backend->device())));
}

int64_t SampleCount(qm_call* call) noexcept { return ContextOf(call).block->windows(); }

absl::Status RunForward(CallContext& context, int64_t sample, const qm_override* overrides,
                        uint64_t count, qm_tensor* out) {
  if (out == nullptr) return absl::InvalidArgumentError("no place for the result");
  QM_ASSIGN_OR_RETURN(const auto values, ReadOverrides(context, overrides, count));
  QM_ASSIGN_OR_RETURN(Tensor output, context.block->Forward(sample, values));
  *out = output.View();
  context.block_output = std::move(output);
  return absl::OkStatus();
}

qm_status Forward(qm_call* call, int64_t sample, const qm_override* overrides, uint64_t count,
                  qm_tensor* out) noexcept {
  const ServiceMark mark(ContextOf(call));
  return FromStatus(call, "forward", RunForward(ContextOf(call), sample, overrides, count, out));
}

absl::Status RunLoss(CallContext& context, const char* submodule, int64_t first, int64_t windows,
                     const qm_override* overrides, uint64_t count, double* out) {
  if (submodule == nullptr || out == nullptr) {
    return absl::InvalidArgumentError("no submodule, or no place for the result");
  }
  QM_ASSIGN_OR_RETURN(const auto values, ReadOverrides(context, overrides, count));
  QM_ASSIGN_OR_RETURN(*out, context.block->Loss(submodule, first, windows, values));
  return absl::OkStatus();
}

qm_status Loss(qm_call* call, const char* submodule, int64_t first, int64_t windows,
               const qm_override* overrides, uint64_t count, double* out) noexcept {
  const ServiceMark mark(ContextOf(call));
  return FromStatus(call, "loss",
                    RunLoss(ContextOf(call), submodule, first, windows, overrides, count, out));
}

absl::StatusOr<std::vector<NamedTensor>> ReadGradients(const CallContext& context,
                                                       const qm_named_tensor* gradients,
                                                       uint64_t count) {
  if (count > kMaxOverrides || (count > 0 && gradients == nullptr)) {
    return absl::InvalidArgumentError(absl::StrCat(count, " gradients were counted, none given"));
  }
  std::vector<NamedTensor> result;
  for (uint64_t i = 0; i < count; ++i) {
    if (gradients[i].name == nullptr) {
      return absl::InvalidArgumentError("a gradient names no tensor");
    }
    absl::StatusOr<Tensor> place = OnDevice(context, gradients[i].tensor);
    if (!place.ok()) return WithContext(place.status(), gradients[i].name);
    result.push_back({gradients[i].name, *std::move(place)});
  }
  return result;
}

absl::Status RunVjp(CallContext& context, int64_t sample, const qm_override* overrides,
                    uint64_t override_count, const qm_tensor* d_out, const qm_named_tensor* grads,
                    uint64_t grad_count) {
  if (d_out == nullptr) return absl::InvalidArgumentError("no gradient of the output");
  QM_ASSIGN_OR_RETURN(const auto values, ReadOverrides(context, overrides, override_count));
  absl::StatusOr<Tensor> output = OnDevice(context, *d_out);
  if (!output.ok()) return WithContext(output.status(), "d_out");
  QM_ASSIGN_OR_RETURN(const auto places, ReadGradients(context, grads, grad_count));
  return context.block->Vjp(sample, values, *output, places);
}

qm_status Vjp(qm_call* call, int64_t sample, const qm_override* overrides, uint64_t override_count,
              const qm_tensor* d_out, qm_named_tensor* grads, uint64_t grad_count) noexcept {
  const ServiceMark mark(ContextOf(call));
  return FromStatus(
      call, "vjp",
      RunVjp(ContextOf(call), sample, overrides, override_count, d_out, grads, grad_count));
}

constexpr qm_host_block kBlock = {sizeof(qm_host_block), SampleCount, Forward, Loss, Vjp};

}  // namespace

const qm_host_block* BlockServiceTable() { return &kBlock; }

}  // namespace quantmill
