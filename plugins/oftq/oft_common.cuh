// What the kernels of rotations share.
#ifndef QUANTMILL_PLUGINS_OFTQ_OFT_COMMON_CUH_
#define QUANTMILL_PLUGINS_OFTQ_OFT_COMMON_CUH_

#include "quantmill/sdk/cuda.hpp"

namespace quantmill::oftq {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;

// More than 48 KiB of shared memory has to be asked for.
template <class Kernel>
qm_status AllowShared(qm_call* call, Kernel kernel, size_t bytes) {
  constexpr size_t kGranted = 48 * 1024;
  if (bytes <= kGranted) return QM_OK;
  QM_CUDA(call, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(bytes)));
  return QM_OK;
}

}  // namespace quantmill::oftq

#endif  // QUANTMILL_PLUGINS_OFTQ_OFT_COMMON_CUH_
