#include "sdk/check/cuda_probe.h"

#include <dlfcn.h>

namespace quantmill::check {
namespace {

// CUresult of the driver API.
constexpr int kSuccess = 0, kNotInitialized = 3;

// cuCtxGetCurrent; kNotInitialized also where no driver has been loaded.
int GetCurrent(void** context) {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  if (driver == nullptr) return kNotInitialized;
  using Function = int (*)(void** context);
  const auto get_current = reinterpret_cast<Function>(dlsym(driver, "cuCtxGetCurrent"));
  return get_current == nullptr ? kNotInitialized : get_current(context);
}

}  // namespace

bool CudaStarted() {
  void* context = nullptr;
  return GetCurrent(&context) != kNotInitialized;
}

const void* CurrentCudaContext() {
  void* context = nullptr;
  return GetCurrent(&context) == kSuccess ? context : nullptr;
}

}  // namespace quantmill::check
