// What a plugin did to CUDA in this process, asked of the driver: host and plugin carry a CUDA
// runtime each, the driver is shared.
#ifndef QUANTMILL_SDK_CHECK_CUDA_PROBE_H_
#define QUANTMILL_SDK_CHECK_CUDA_PROBE_H_

namespace quantmill::check {

// The context current in this thread; null when there is none or no driver has been loaded.
const void* CurrentCudaContext();

// True when someone in this process has loaded the CUDA driver library.
bool CudaDriverLoaded();

}  // namespace quantmill::check

#endif  // QUANTMILL_SDK_CHECK_CUDA_PROBE_H_
