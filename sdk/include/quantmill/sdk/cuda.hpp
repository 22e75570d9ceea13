// CUDA calls from a plugin. Include only where CUDA is compiled in (QM_HAVE_CUDA).
#ifndef QUANTMILL_SDK_CUDA_HPP_
#define QUANTMILL_SDK_CUDA_HPP_

#include <cuda_runtime_api.h>

#include "quantmill/sdk/status.hpp"

// Returns from the enclosing function with an error that names the expression, file and line unless
// `expr` gives cudaSuccess. After a launch: QM_CUDA(call, cudaGetLastError()).
#define QM_CUDA(call, expr)                                                        \
  do {                                                                             \
    const cudaError_t qm_cuda_error_ = (expr);                                     \
    if (qm_cuda_error_ != cudaSuccess) {                                           \
      return ::qm::CudaFailure((call), qm_cuda_error_, #expr, __FILE__, __LINE__); \
    }                                                                              \
  } while (false)

namespace qm {

// The error that QM_CUDA returns.
inline qm_status CudaFailure(qm_call* call, cudaError_t error, const char* expression,
                             const char* file, int line) {
  const qm_status code = error == cudaErrorMemoryAllocation ? QM_RESOURCE_EXHAUSTED : QM_INTERNAL;
  return Fail(call, code, expression, " failed: ", cudaGetErrorName(error), " (",
              cudaGetErrorString(error), ") at ", file, ":", line);
}

// The stream that all work of a call goes to.
inline cudaStream_t Stream(const qm_call* call) {
  return static_cast<cudaStream_t>(call->cuda_stream);
}

}  // namespace qm

#endif  // QUANTMILL_SDK_CUDA_HPP_
