// Gathering and scattering of rows. CPU references: Embed, GatherRows, ScatterAddRows of core/cpu.
#ifndef QUANTMILL_CORE_CUDA_ROWS_CUH_
#define QUANTMILL_CORE_CUDA_ROWS_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/tensor/dtype.h"

namespace quantmill::cuda {

// out[i, :] = source[index[i], :], converting source_dtype to dtype; rows of `width` elements,
// i in [0, count), every index inside the source. index: on the device.
cudaError_t LaunchGatherRows(const void* source, DType source_dtype, const int32_t* index,
                             int64_t count, int64_t width, void* out, DType dtype,
                             cudaStream_t stream);

// target[index[i], :] += weights[i] * x[i, :]; the indices are distinct. index, weights: on the
// device.
cudaError_t LaunchScatterAddRows(const void* x, const int32_t* index, const float* weights,
                                 int64_t count, int64_t width, void* target, DType dtype,
                                 cudaStream_t stream);

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_CUDA_ROWS_CUH_
