// RMS normalization. CPU reference: RmsNorm of core/cpu.
#ifndef QUANTMILL_CORE_CUDA_NORM_CUH_
#define QUANTMILL_CORE_CUDA_NORM_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/tensor/dtype.h"

namespace quantmill::cuda {

// out[r, :] = x[r, :] / sqrt(mean(x[r, :]^2) + eps) * weight for `rows` rows of `width` elements.
// x and out: `dtype`, may be the same memory; weight: [width] of `weight_dtype`. Sums in f32.
cudaError_t LaunchRmsNorm(const void* x, DType dtype, const void* weight, DType weight_dtype,
                          float eps, int64_t rows, int64_t width, void* out, cudaStream_t stream);

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_CUDA_NORM_CUH_
