// What a plugin did to CUDA in this process, asked of the driver: host and plugin carry a CUDA
// runtime each, the driver is shared.
#ifndef QUANTMILL_SDK_CHECK_CUDA_PROBE_H_
#define QUANTMILL_SDK_CHECK_CUDA_PROBE_H_

namespace quantmill::check {

// The context current in this thread; null when there is none or no driver has been loaded.
const void* CurrentCudaContext();

// True when someone in this process has started the CUDA driver (cuInit). Having its library loaded
// is not enough: the CUDA runtime of this very program does so when it registers its kernels.
bool CudaStarted();

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_CUDA_PROBE_H_
