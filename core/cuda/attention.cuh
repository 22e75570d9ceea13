// Causal grouped-query attention. CPU reference: Attention of core/cpu.
#ifndef QUANTMILL_CORE_CUDA_ATTENTION_CUH_
#define QUANTMILL_CORE_CUDA_ATTENTION_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/tensor/dtype.h"

namespace quantmill::cuda {

// All tensors have the same dtype and lie on the device. Rows of q and out: [heads * head_dim];
// rows of keys and values: [kv_heads * head_dim].
struct AttentionArguments {
  const void* q;       // [batch * query_length, ...]
  const void* keys;    // [batch * capacity, ...]
  const void* values;  // [batch * capacity, ...]
  void* out;           // [batch * query_length, ...]
  int64_t batch;
  int64_t query_length;
  int64_t past_length;  // position of the first query; keys 0 .. past + query_length - 1 are valid
  int64_t capacity;     // rows of keys and values per sequence
  int heads, kv_heads, head_dim;
  int64_t window;  // position i sees max(0, i - window + 1) .. i; 0 = no limit
  float scale;     // of the products of q and keys
};

// ---- tensor cores (attention_prefill.cu) ----
// F16 or BF16, head_dim 32, 64, 80, 96 or 128, 16-byte aligned.
bool PrefillAttentionSuits(const AttentionArguments& arguments, DType dtype);
cudaError_t LaunchPrefillAttention(const AttentionArguments& arguments, DType dtype,
                                   cudaStream_t stream);

// ---- one query per sequence, split over keys (attention_decode.cu) ----
// query_length 1, even head_dim up to 256, 4-element aligned.
bool DecodeAttentionSuits(const AttentionArguments& arguments, DType dtype);
// f32 elements of scratch LaunchDecodeAttention needs.
int64_t DecodeAttentionScratch(const AttentionArguments& arguments);
cudaError_t LaunchDecodeAttention(const AttentionArguments& arguments, DType dtype, float* scratch,
                                  cudaStream_t stream);

// ---- f32 arithmetic (attention_plain.cu) ----
inline constexpr int kMaxHeadDim = 256;
// Any dtype, any head_dim up to kMaxHeadDim.
cudaError_t LaunchPlainAttention(const AttentionArguments& arguments, DType dtype,
                                 cudaStream_t stream);

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_CUDA_ATTENTION_CUH_
