// Routing, gathering and scattering of rows of the CUDA backend.
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/cuda/cuda_backend.h"
#include "core/cuda/cuda_status.h"
#include "core/cuda/route.cuh"
#include "core/cuda/rows.cuh"

namespace quantmill::cuda {
namespace {

absl::Status ExpectDistinct(const Checker& checks, const Tensor& rows, int64_t limit) {
  std::vector<bool> seen(static_cast<size_t>(limit));
  for (int64_t i = 0; i < rows.elements(); ++i) {
    const auto row = static_cast<size_t>(rows.as<int32_t>()[i]);
    if (seen[row]) return checks.Invalid(absl::StrCat("row ", row, " is named twice"));
    seen[row] = true;
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CudaBackend::RouteTopK(const Tensor& router_logits, int64_t top_k, bool normalize,
                                    Tensor* experts_out, Tensor* weights_out) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("route");
  QM_RETURN_IF_ERROR(checks.Matrix("router_logits", router_logits));
  const int64_t rows = router_logits.dim(0);
  const int64_t experts = router_logits.dim(1);
  QM_RETURN_IF_ERROR(checks.Expect(
      top_k >= 1 && top_k <= experts && experts <= kMaxExperts, "top_k ", top_k, " of ", experts,
      " experts; at least 1 and at most ", kMaxExperts, " experts are supported"));
  const Shape shape = {rows, top_k};
  QM_RETURN_IF_ERROR(checks.HostOutput("experts_out", experts_out, DType::kI32, shape));
  QM_RETURN_IF_ERROR(checks.HostOutput("weights_out", weights_out, DType::kF32, shape));
  if (rows == 0) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(const Tensor index, Allocate(DType::kI32, shape));
  QM_ASSIGN_OR_RETURN(const Tensor weights, Allocate(DType::kF32, shape));
  QM_CUDA_RETURN(LaunchRouteTopK(router_logits.data(), router_logits.dtype(), rows,
                                 static_cast<int>(experts), static_cast<int>(top_k), normalize,
                                 index.as<int32_t>(), weights.as<float>(), work()));
  QM_RETURN_IF_ERROR(staging_->ToHost(index.data(), experts_out->data(), index.bytes()));
  return staging_->ToHost(weights.data(), weights_out->data(), weights.bytes());
}

absl::Status CudaBackend::GatherRows(const Tensor& x, const Tensor& rows, Tensor* out) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("gather rows");
  QM_RETURN_IF_ERROR(checks.Matrix("x", x));
  QM_RETURN_IF_ERROR(checks.Expect(rows.rank() == 1, "rows must have one dimension"));
  QM_RETURN_IF_ERROR(checks.HostInput("rows", rows, DType::kI32, rows.shape()));
  QM_RETURN_IF_ERROR(checks.Indices("rows", rows, x.dim(0)));
  QM_RETURN_IF_ERROR(checks.Output("out", out, x.dtype(), {rows.dim(0), x.dim(1)}));
  if (out->elements() == 0) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(const Tensor index, Upload(rows));
  QM_CUDA_RETURN(LaunchGatherRows(x.data(), x.dtype(), index.as<int32_t>(), rows.dim(0), x.dim(1),
                                  out->data(), out->dtype(), work()));
  return absl::OkStatus();
}

absl::Status CudaBackend::ScatterAddRows(const Tensor& x, const Tensor& rows, const Tensor& weights,
                                         Tensor* target) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("scatter rows");
  QM_RETURN_IF_ERROR(checks.Matrix("x", x));
  QM_RETURN_IF_ERROR(checks.HostInput("rows", rows, DType::kI32, {x.dim(0)}));
  QM_RETURN_IF_ERROR(checks.HostInput("weights", weights, DType::kF32, {x.dim(0)}));
  QM_RETURN_IF_ERROR(checks.Expect(target != nullptr, "target is null"));
  QM_RETURN_IF_ERROR(checks.Matrix("target", *target));
  QM_RETURN_IF_ERROR(checks.Output("target", target, x.dtype(), {target->dim(0), x.dim(1)}));
  QM_RETURN_IF_ERROR(checks.Indices("rows", rows, target->dim(0)));
  QM_RETURN_IF_ERROR(ExpectDistinct(checks, rows, target->dim(0)));
  if (x.elements() == 0) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(const Tensor index, Upload(rows));
  QM_ASSIGN_OR_RETURN(const Tensor factors, Upload(weights));
  QM_CUDA_RETURN(LaunchScatterAddRows(x.data(), index.as<int32_t>(), factors.as<float>(), x.dim(0),
                                      x.dim(1), target->data(), x.dtype(), work()));
  return absl::OkStatus();
}

}  // namespace quantmill::cuda
