// Routing of tokens to experts (Mixtral and Qwen3-MoE: transformers
// src/transformers/models/mixtral/modeling_mixtral.py, MixtralTopKRouter).
//
//   p = softmax(logits[r, :]),  take the top_k largest p, lowest index first on ties
//   weights = p[taken] / (normalize ? sum of p[taken] : 1)
//
// Work: one warp per row, four rows per block; a row's probabilities lie in shared memory, and each
// of the top_k rounds is a warp-wide argmax that strikes out what it found. Time is that of a
// launch for any real number of experts.
#include <climits>
#include <cmath>

#include "core/cuda/kernel_common.cuh"
#include "core/cuda/route.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kRowsPerBlock = 4;

template <typename T>
__global__ void RouteTopKKernel(const T* __restrict__ logits, int64_t rows, int experts, int top_k,
                                bool normalize, int32_t* __restrict__ experts_out,
                                float* __restrict__ weights_out) {
  extern __shared__ float shared[];
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = blockIdx.x * static_cast<int64_t>(kRowsPerBlock) + threadIdx.x / kWarpSize;
  if (row >= rows) return;  // whole warps leave together
  float* p = shared + threadIdx.x / kWarpSize * experts;

  float maximum = -INFINITY;
  for (int e = lane; e < experts; e += kWarpSize) {
    p[e] = ToFloat(logits[row * experts + e]);
    maximum = fmaxf(maximum, p[e]);
  }
  maximum = WarpMax(maximum);
  float sum = 0;
  for (int e = lane; e < experts; e += kWarpSize) {
    p[e] = expf(p[e] - maximum);
    sum += p[e];
  }
  sum = WarpSum(sum);
  for (int e = lane; e < experts; e += kWarpSize) p[e] /= sum;
  __syncwarp();

  float taken_sum = 0;
  for (int k = 0; k < top_k; ++k) {
    float best = -1.0f;
    int best_index = INT_MAX;
    for (int e = lane; e < experts; e += kWarpSize) {
      if (p[e] > best) {
        best = p[e];
        best_index = e;
      }
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      const float value = __shfl_xor_sync(kFullMask, best, offset);
      const int index = __shfl_xor_sync(kFullMask, best_index, offset);
      if (value > best || (value == best && index < best_index)) {
        best = value;
        best_index = index;
      }
    }
    if (best_index == INT_MAX) {  // a row of NaN: any distinct experts, and weights that show it
      best_index = k;
      best = NAN;
    }
    taken_sum += best;
    if (lane == 0) {
      experts_out[row * top_k + k] = best_index;
      weights_out[row * top_k + k] = best;
      p[best_index] = -2.0f;  // below any candidate
    }
    __syncwarp();
  }
  if (normalize && lane == 0) {
    for (int k = 0; k < top_k; ++k) weights_out[row * top_k + k] /= taken_sum;
  }
}

}  // namespace

cudaError_t LaunchRouteTopK(const void* logits, DType dtype, int64_t rows, int experts, int top_k,
                            bool normalize, int32_t* experts_out, float* weights_out,
                            cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    const auto blocks = static_cast<unsigned>(CeilDiv(rows, kRowsPerBlock));
    const size_t shared = static_cast<size_t>(kRowsPerBlock) * experts * sizeof(float);
    RouteTopKKernel<T><<<blocks, kRowsPerBlock * kWarpSize, shared, stream>>>(
        static_cast<const T*>(logits), rows, experts, top_k, normalize, experts_out, weights_out);
    return cudaGetLastError();
  });
}

}  // namespace quantmill::cuda
