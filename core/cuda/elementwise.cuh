// Element-wise steps of a decoder block. CPU references: SiluMultiply, Add, AddBias of core/cpu.
#ifndef QUANTMILL_CORE_CUDA_ELEMENTWISE_CUH_
#define QUANTMILL_CORE_CUDA_ELEMENTWISE_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/tensor/dtype.h"

namespace quantmill::cuda {

// out[i] = gate[i] / (1 + exp(-gate[i])) * up[i]; out may be gate or up.
cudaError_t LaunchSiluMultiply(const void* gate, const void* up, DType dtype, int64_t count,
                               void* out, cudaStream_t stream);
// target[i] += x[i].
cudaError_t LaunchAdd(const void* x, DType dtype, int64_t count, void* target, cudaStream_t stream);
// x[r, i] += bias[i]; x: [rows, width].
cudaError_t LaunchAddBias(const void* bias, DType bias_dtype, DType dtype, int64_t rows,
                          int64_t width, void* x, cudaStream_t stream);

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_CUDA_ELEMENTWISE_CUH_
