// CUDA, cuBLAS and cuSOLVER results as Status. For .cc files of core/cuda.
#ifndef QUANTMILL_CORE_CUDA_CUDA_STATUS_H_
#define QUANTMILL_CORE_CUDA_CUDA_STATUS_H_

#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <cusolverDn.h>

#include "absl/status/status.h"

namespace quantmill::cuda {

// OK, or: DATA_LOSS for an error after which CUDA answers every call of this process with the same
// one (illegal address, launch failure, uncorrectable ECC and their kin), RESOURCE_EXHAUSTED when
// memory ran out, else INTERNAL; the text has the expression, file:line and the error's name.
// Clears the runtime's remembered error where that is possible.
absl::Status CudaStatus(cudaError_t error, const char* expression, const char* file, int line);
absl::Status CublasStatus(cublasStatus_t status, const char* expression, const char* file,
                          int line);
absl::Status CusolverStatus(cusolverStatus_t status, const char* expression, const char* file,
                            int line);

}  // namespace quantmill::cuda

// Return from the enclosing function on failure of a cudaError_t, cublasStatus_t or
// cusolverStatus_t expression.
#define QM_CUDA_RETURN(expr)                                                           \
  do {                                                                                 \
    const cudaError_t qm_cuda_error_ = (expr);                                         \
    if (qm_cuda_error_ != cudaSuccess) {                                               \
      return ::quantmill::cuda::CudaStatus(qm_cuda_error_, #expr, __FILE__, __LINE__); \
    }                                                                                  \
  } while (false)

#define QM_CUBLAS_RETURN(expr)                                                              \
  do {                                                                                      \
    const cublasStatus_t qm_cublas_status_ = (expr);                                        \
    if (qm_cublas_status_ != CUBLAS_STATUS_SUCCESS) {                                       \
      return ::quantmill::cuda::CublasStatus(qm_cublas_status_, #expr, __FILE__, __LINE__); \
    }                                                                                       \
  } while (false)

#define QM_CUSOLVER_RETURN(expr)                                                                \
  do {                                                                                          \
    const cusolverStatus_t qm_cusolver_status_ = (expr);                                        \
    if (qm_cusolver_status_ != CUSOLVER_STATUS_SUCCESS) {                                       \
      return ::quantmill::cuda::CusolverStatus(qm_cusolver_status_, #expr, __FILE__, __LINE__); \
    }                                                                                           \
  } while (false)

#endif  // QUANTMILL_CORE_CUDA_CUDA_STATUS_H_
