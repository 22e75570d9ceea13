#include "core/cuda/cuda_status.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "core/base/status.h"

namespace quantmill::cuda {
namespace {

// Errors of which the CUDA runtime documents that the process must be ended and started again
// (driver_types.h, cudaError).
bool EndsTheProcess(cudaError_t error) {
  switch (error) {
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorTensorMemoryLeak:
    case cudaErrorContained:
    case cudaErrorExternalDevice:
      return true;
    default:
      return false;
  }
}

std::string Place(const char* expression, const char* file, int line) {
  absl::string_view path(file);
  const size_t root = path.rfind("core/cuda/");
  if (root != absl::string_view::npos) path.remove_prefix(root);
  return absl::StrCat("CUDA call failed at ", path, ":", line, ": ", expression);
}

}  // namespace

absl::Status CudaStatus(cudaError_t error, const char* expression, const char* file, int line) {
  if (error == cudaSuccess) return absl::OkStatus();
  cudaGetLastError();  // a sticky error comes back by itself, any other must not
  const std::string what = Place(expression, file, line);
  const std::string why =
      absl::StrCat(cudaGetErrorName(error), " (", cudaGetErrorString(error), ")");
  if (EndsTheProcess(error)) {
    return absl::DataLossError(
        ErrorText(what, why,
                  "the GPU context is lost and needs a new process; run again with "
                  "CUDA_LAUNCH_BLOCKING=1 to find the kernel"));
  }
  if (error == cudaErrorMemoryAllocation) {
    return absl::ResourceExhaustedError(
        ErrorText(what, why, "free GPU memory or use fewer or shorter windows"));
  }
  return absl::InternalError(
      ErrorText(what, why, "check that the driver is at least as new as CUDA 13"));
}

absl::Status CublasStatus(cublasStatus_t status, const char* expression, const char* file,
                          int line) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  const cudaError_t error = cudaPeekAtLastError();
  if (EndsTheProcess(error)) return CudaStatus(error, expression, file, line);
  const std::string text = ErrorText(Place(expression, file, line), cublasGetStatusName(status),
                                     "check the installed cuBLAS and the free GPU memory");
  return status == CUBLAS_STATUS_ALLOC_FAILED ? absl::ResourceExhaustedError(text)
                                              : absl::InternalError(text);
}

absl::Status CusolverStatus(cusolverStatus_t status, const char* expression, const char* file,
                            int line) {
  if (status == CUSOLVER_STATUS_SUCCESS) return absl::OkStatus();
  const cudaError_t error = cudaPeekAtLastError();
  if (EndsTheProcess(error)) return CudaStatus(error, expression, file, line);
  const std::string text = ErrorText(Place(expression, file, line),
                                     absl::StrCat("cuSOLVER status ", static_cast<int>(status)),
                                     "check the installed cuSOLVER and the free GPU memory");
  return status == CUSOLVER_STATUS_ALLOC_FAILED ? absl::ResourceExhaustedError(text)
                                                : absl::InternalError(text);
}

}  // namespace quantmill::cuda
