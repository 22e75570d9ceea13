// Rotary position embedding. CPU reference: Rope of core/cpu.
#ifndef QUANTMILL_CORE_CUDA_ROPE_CUH_
#define QUANTMILL_CORE_CUDA_ROPE_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/tensor/dtype.h"

namespace quantmill::cuda {

// Rotates x [rows, heads * head_dim] in place; row r has position first_position + r % length.
// cosine, sine: f32 [positions, head_dim / 2].
cudaError_t LaunchRope(const float* cosine, const float* sine, int64_t first_position,
                       int64_t length, int64_t rows, int64_t heads, int64_t head_dim, DType dtype,
                       void* x, cudaStream_t stream);

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_CUDA_ROPE_CUH_
