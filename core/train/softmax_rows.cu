// The softmax of attention over rows of scores, and its backward pass (Vaswani et al. 2017, section
// 3.2.1; the Jacobian of softmax is diag(p) - p p^T):
//
//   p[r, c] = exp(s[r, c] - max_c s) / sum_c exp(s[r, c] - max_c s)   over the keys that row r sees
//   d_s[r, c] = p[r, c] (d_p[r, c] - sum_c p[r, c] d_p[r, c])
//
// s, d_p: f32 [rows, keys]; p, d_s: the activation dtype (they are factors of matrix products), f32
// sums. CPU reference: SoftmaxRow and HeadBackward of cpu_ops.cc.
//
// Work: one block per row; the row is read two or three times, later times from L1/L2. A thread
// reads p before it overwrites it and no other thread does. Bound by memory: rows * keys * (8 to 12
// bytes); the matrix products around it take longer.
//
// Versions
//   1  as described (in use)
#include <cmath>

#include "core/cuda/kernel_common.cuh"
#include "core/train/backward_kernels.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 256;

// Maximum over the block, the same on every thread; ends with a barrier.
__device__ __forceinline__ float BlockMax(float value, float* scratch) {
  value = WarpMax(value);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float maximum = scratch[0];
  for (int i = 1; i < kThreads / kWarpSize; ++i) maximum = fmaxf(maximum, scratch[i]);
  __syncthreads();
  return maximum;
}

template <typename T>
__global__ void SoftmaxRowsKernel1(ScoreTile tile, const float* scores, T* p) {
  __shared__ float scratch[kThreads / kWarpSize];
  const int64_t position = tile.first_query + blockIdx.x;
  const int64_t first = tile.window > 0 && position >= tile.window ? position - tile.window + 1 : 0;
  const int64_t begin = first - tile.first_key;
  const int64_t end = position + 1 - tile.first_key;
  const float* row = scores + blockIdx.x * tile.keys;
  T* out = p + blockIdx.x * tile.keys;
  float maximum = -INFINITY;
  for (int64_t c = begin + threadIdx.x; c < end; c += kThreads) maximum = fmaxf(maximum, row[c]);
  maximum = BlockMax(maximum, scratch);
  float sum = 0;
  for (int64_t c = begin + threadIdx.x; c < end; c += kThreads) sum += expf(row[c] - maximum);
  const float factor = 1.0f / BlockSum(sum, scratch);
  for (int64_t c = threadIdx.x; c < tile.keys; c += kThreads) {
    const bool seen = c >= begin && c < end;
    out[c] = FromFloat<T>(seen ? expf(row[c] - maximum) * factor : 0.0f);
  }
}

template <typename T>
__global__ void SoftmaxBackwardKernel1(int64_t keys, const float* d_p, T* p) {
  __shared__ float scratch[kThreads / kWarpSize];
  const float* d_row = d_p + blockIdx.x * keys;
  T* row = p + blockIdx.x * keys;
  float sum = 0;
  for (int64_t c = threadIdx.x; c < keys; c += kThreads) sum += ToFloat(row[c]) * d_row[c];
  sum = BlockSum(sum, scratch);
  for (int64_t c = threadIdx.x; c < keys; c += kThreads) {
    row[c] = FromFloat<T>(ToFloat(row[c]) * (d_row[c] - sum));
  }
}

}  // namespace

cudaError_t LaunchSoftmaxRows(const ScoreTile& tile, const float* scores, DType dtype, void* p,
                              cudaStream_t stream) {
  if (tile.rows == 0) return cudaSuccess;
  return DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    SoftmaxRowsKernel1<T><<<static_cast<unsigned>(tile.rows), kThreads, 0, stream>>>(
        tile, scores, static_cast<T*>(p));
    return cudaGetLastError();
  });
}

cudaError_t LaunchSoftmaxBackward(const ScoreTile& tile, const float* d_p, DType dtype, void* p,
                                  cudaStream_t stream) {
  if (tile.rows == 0) return cudaSuccess;
  return DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    SoftmaxBackwardKernel1<T><<<static_cast<unsigned>(tile.rows), kThreads, 0, stream>>>(
        tile.keys, d_p, static_cast<T*>(p));
    return cudaGetLastError();
  });
}

}  // namespace quantmill::cuda
