// Conversion between F32, F16 and BF16 on the device. CPU reference: the scalar conversions of
// core/tensor/dtype.h.
#ifndef QUANTMILL_CORE_CUDA_CONVERT_CUH_
#define QUANTMILL_CORE_CUDA_CONVERT_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/tensor/dtype.h"

namespace quantmill::cuda {

// target[i] = source[i] for i in [0, count), rounding to nearest even.
cudaError_t LaunchConvert(const void* source, DType source_dtype, void* target, DType target_dtype,
                          int64_t count, cudaStream_t stream);

// out[i] = a[i] - b[i] in f32; a and b have the same dtype.
cudaError_t LaunchDifference(const void* a, const void* b, DType dtype, float* out, int64_t count,
                             cudaStream_t stream);

// a[i] - b[i] = high[i] + middle[i] + low[i] for BF16 a and b, each part BF16: the parts hold the
// 24 bits of the f32 difference, 8 each.
cudaError_t LaunchDifferencePieces(const void* a, const void* b, void* high, void* middle,
                                   void* low, int64_t count, cudaStream_t stream);

// cudaSuccess when this build holds machine code for the current GPU.
cudaError_t ProbeKernelImage();

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_CUDA_CONVERT_CUH_
