// Tokens drawn from logits. CPU reference: core/cpu/draw.h.
#ifndef QUANTMILL_CORE_CUDA_DRAW_CUH_
#define QUANTMILL_CORE_CUDA_DRAW_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/tensor/dtype.h"

namespace quantmill::cuda {

// tokens[r] = the first v at which the sum of softmax(logits[r, :]) up to v exceeds uniforms[r],
// tokens in excluded[0 .. excluded_count) having no share; -1 when the row is no distribution.
// logits: [rows, vocab] of dtype; uniforms f64 in [0, 1); all on the device.
cudaError_t LaunchDrawRows(const void* logits, DType dtype, const int32_t* excluded,
                           int excluded_count, const double* uniforms, int64_t rows, int64_t vocab,
                           int32_t* tokens, cudaStream_t stream);

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_CUDA_DRAW_CUH_
