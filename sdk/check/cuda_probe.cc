#include "sdk/check/cuda_probe.h"

#include <dlfcn.h>

namespace quantmill::check {

bool CudaDriverLoaded() { return dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD) != nullptr; }

const void* CurrentCudaContext() {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  if (driver == nullptr) return nullptr;
  using GetCurrent = int (*)(void** context);
  const auto get_current = reinterpret_cast<GetCurrent>(dlsym(driver, "cuCtxGetCurrent"));
  void* context = nullptr;
  if (get_current == nullptr || get_current(&context) != 0) return nullptr;
  return context;
}

}  // namespace quantmill::check
