// InverseCholesky of the CUDA backend, through cuSOLVER; the derivation is in cholesky.cu.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/cuda/cholesky.cuh"
#include "core/cuda/cuda_backend.h"
#include "core/cuda/cuda_status.h"

namespace quantmill::cuda {
namespace {

// What the device reports back: failing minor of the factorization, failing pivot of the inverse,
// number of unusable entries of the result. All 0 on success.
constexpr int kFactorInfo = 0;
constexpr int kInverseInfo = 1;
constexpr int kBadEntries = 2;
constexpr int kInfos = 3;

absl::Status NotPositiveDefinite(const std::array<int32_t, kInfos>& info, int64_t n, double damp) {
  const int minor = info[kFactorInfo] > 0 ? info[kFactorInfo] : info[kInverseInfo];
  return absl::FailedPreconditionError(ErrorText(
      absl::StrCat("the damped ", n, " x ", n, " matrix is not positive definite"),
      minor > 0 ? absl::StrCat("the factorization stopped at pivot ", minor, " of ", n,
                               " with damping ", damp)
                : absl::StrCat(info[kBadEntries], " entries of the result are not usable numbers"),
      "use more damping, or check the calibration data for dead or non-finite inputs"));
}

}  // namespace

absl::Status CudaBackend::OpenSolver() {
  if (solver_ == nullptr) {
    QM_CUSOLVER_RETURN(cusolverDnCreate(&solver_));
    QM_CUSOLVER_RETURN(cusolverDnSetStream(solver_, work()));
  }
  if (solver_params_ == nullptr) QM_CUSOLVER_RETURN(cusolverDnCreateParams(&solver_params_));
  return absl::OkStatus();
}

// matrix (row-major) = L L^T becomes, in its lower triangle, L^-1. cuSOLVER is column-major: what
// it takes for the upper triangle is our lower one, so it factors matrix = R^T R with R = L^T.
absl::Status CudaBackend::FactorAndInvert(int64_t n, float* matrix, int* info) {
  QM_RETURN_IF_ERROR(OpenSolver());
  constexpr cublasFillMode_t kUpper = CUBLAS_FILL_MODE_UPPER;
  size_t device_factor = 0, host_factor = 0, device_inverse = 0, host_inverse = 0;
  QM_CUSOLVER_RETURN(cusolverDnXpotrf_bufferSize(solver_, solver_params_, kUpper, n, CUDA_R_32F,
                                                 matrix, n, CUDA_R_32F, &device_factor,
                                                 &host_factor));
  QM_CUSOLVER_RETURN(cusolverDnXtrtri_bufferSize(solver_, kUpper, CUBLAS_DIAG_NON_UNIT, n,
                                                 CUDA_R_32F, matrix, n, &device_inverse,
                                                 &host_inverse));
  QM_ASSIGN_OR_RETURN(
      const std::shared_ptr<void> buffer,
      memory_->Allocate(static_cast<int64_t>(std::max(device_factor, device_inverse))));
  std::vector<char> host_buffer(std::max(host_factor, host_inverse));
  QM_CUSOLVER_RETURN(cusolverDnXpotrf(solver_, solver_params_, kUpper, n, CUDA_R_32F, matrix, n,
                                      CUDA_R_32F, buffer.get(), device_factor, host_buffer.data(),
                                      host_factor, info + kFactorInfo));
  QM_CUSOLVER_RETURN(cusolverDnXtrtri(solver_, kUpper, CUBLAS_DIAG_NON_UNIT, n, CUDA_R_32F, matrix,
                                      n, buffer.get(), device_inverse, host_buffer.data(),
                                      host_inverse, info + kInverseInfo));
  // The host buffers must outlive the work that was queued.
  QM_CUDA_RETURN(cudaStreamSynchronize(work()));
  return absl::OkStatus();
}

absl::Status CudaBackend::InverseCholesky(const qm_tensor& h, double damp, const qm_tensor& out) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("inverse cholesky");
  QM_RETURN_IF_ERROR(checks.View("h", h));
  QM_RETURN_IF_ERROR(checks.View("out", out));
  const int64_t n = h.shape[0];
  QM_RETURN_IF_ERROR(checks.Expect(h.dtype == QM_F32 && out.dtype == QM_F32, "h and out are F32"));
  QM_RETURN_IF_ERROR(checks.Expect(h.shape[1] == n && out.shape[0] == n && out.shape[1] == n,
                                   "h is [", n, ", ", h.shape[1], "] and out [", out.shape[0], ", ",
                                   out.shape[1], "]; both must be square and equal"));
  QM_RETURN_IF_ERROR(checks.Expect((out.flags & QM_TENSOR_READONLY) == 0, "out is read-only"));
  QM_RETURN_IF_ERROR(checks.Expect(std::isfinite(damp) && damp >= 0, "damping ", damp,
                                   " is negative or not finite"));
  if (n == 0) return absl::OkStatus();

  QM_ASSIGN_OR_RETURN(const Tensor matrix, Allocate(DType::kF32, {n, n}));
  QM_ASSIGN_OR_RETURN(const Tensor mean, Allocate(DType::kF32, {1}));
  QM_ASSIGN_OR_RETURN(Tensor info, Allocate(DType::kI32, {kInfos}));
  QM_RETURN_IF_ERROR(Zero(&info));
  QM_CUDA_RETURN(LaunchReverseDamped(static_cast<const float*>(h.data), RowStride(h), n, damp,
                                     matrix.as<float>(), mean.as<float>(), work()));
  QM_RETURN_IF_ERROR(FactorAndInvert(n, matrix.as<float>(), info.as<int>()));
  QM_CUDA_RETURN(LaunchReverseUpper(matrix.as<float>(), n, static_cast<float*>(out.data),
                                    RowStride(out), info.as<int>() + kBadEntries, work()));
  std::array<int32_t, kInfos> found = {};
  QM_RETURN_IF_ERROR(staging_->ToHost(info.data(), found.data(), info.bytes()));
  if (found != std::array<int32_t, kInfos>{}) return NotPositiveDefinite(found, n, damp);
  return absl::OkStatus();
}

}  // namespace quantmill::cuda
