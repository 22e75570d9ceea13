// Backward pass of causal attention on the tensor cores. CPU reference: DoAttention of
// core/train/cpu_ops.cc. All work goes to `stream`; nothing is synchronised.
#ifndef QUANTMILL_CORE_TRAIN_ATTENTION_BACKWARD_CUH_
#define QUANTMILL_CORE_TRAIN_ATTENTION_BACKWARD_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/tensor/dtype.h"

namespace quantmill::cuda {

// Rows of q, d_out and d_q: [heads * head_dim]; rows of keys, values and their gradients:
// [kv_heads * head_dim]; batch * length rows each. A query at position i of its sequence sees keys
// max(0, i - window + 1) .. i (window 0: 0 .. i).
struct AttentionBackward {
  const void* q;  // of the activation dtype, as keys, values and d_out
  const void* keys;
  const void* values;
  const void* d_out;
  float* d_q;
  float* d_keys;
  float* d_values;
  float* statistics;  // scratch: 2 * batch * heads * length
  int64_t batch, length;
  int heads, kv_heads, head_dim;
  int64_t window;
  float scale;
};

// F16 or BF16, head_dim 64 or 128, 16-byte aligned, scale > 0, at most 2^21 positions, 65535
// sequences.
bool AttentionBackwardSuits(const AttentionBackward& arguments, DType dtype);
cudaError_t LaunchAttentionBackward(const AttentionBackward& arguments, DType dtype,
                                    cudaStream_t stream);

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_TRAIN_ATTENTION_BACKWARD_CUH_
