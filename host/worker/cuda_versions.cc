#include "host/worker/services.h"

#if QM_WITH_CUDA
#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#endif

namespace quantmill {

#if QM_WITH_CUDA
bool CudaVersions(qm_host_cuda* out) {
  int runtime = 0, driver = 0, major = 0, minor = 0, patch = 0;
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) return false;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) return false;
  if (cublasGetProperty(MAJOR_VERSION, &major) != CUBLAS_STATUS_SUCCESS) return false;
  if (cublasGetProperty(MINOR_VERSION, &minor) != CUBLAS_STATUS_SUCCESS) return false;
  if (cublasGetProperty(PATCH_LEVEL, &patch) != CUBLAS_STATUS_SUCCESS) return false;
  out->runtime_version = runtime;
  out->driver_version = driver;
  out->cublas_version = major * 10000 + minor * 100 + patch;
  return true;
}

int64_t CudaFreeBytes(int index) {
  size_t free_bytes = 0, total = 0;
  if (cudaSetDevice(index) != cudaSuccess) return 0;
  return cudaMemGetInfo(&free_bytes, &total) == cudaSuccess ? static_cast<int64_t>(free_bytes) : 0;
}
#else
bool CudaVersions(qm_host_cuda*) { return false; }
int64_t CudaFreeBytes(int) { return 0; }
#endif

}  // namespace quantmill
