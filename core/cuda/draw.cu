// Drawing a token per row of logits by inverting the distribution function.
//
//   w[v] = exp(x[v] - max x), 0 where v is excluded;  total = sum_v w[v]
//   token = min { v : w[0] + ... + w[v] > uniform * total }
//
// logits x: [rows, vocab]. Exponentials in f32, sums in f64: a sum over 128k f32 terms would move
// the borders between tokens by more than the exponentials' own error.
//
// Work: one block of 512 threads per row. Each of its 16 warps owns one contiguous segment of the
// vocabulary, which its lanes read coalesced: once for the maximum, once for the segment's sum. The
// 16 sums say which segment holds the token; the block's first warp then walks that segment in
// steps of 32 with a prefix sum per step. The excluded tokens are a handful (beginnings and ends of
// text), so each weight is compared with all of them. Bound by memory; the second pass and the walk
// are served by L2. The order of every sum is fixed.
//
// Measured as a part of drawing: 819 sequences at once from a model of 19 M parameters and 8192
// tokens, 258,000 tokens/s in all (H200, 2026-11-29).
#include <cmath>

#include "core/cuda/draw.cuh"
#include "core/cuda/kernel_common.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;

// A row of logits without the excluded tokens.
template <typename T>
struct Row {
  const T* logits;
  const int32_t* excluded;
  int excluded_count;

  __device__ __forceinline__ float operator[](int64_t v) const {
    for (int i = 0; i < excluded_count; ++i) {
      if (v == excluded[i]) return -INFINITY;
    }
    return ToFloat(logits[v]);
  }
};

template <typename T>
__device__ float BlockMax(const Row<T>& row, int64_t begin, int64_t end) {
  __shared__ float scratch[kWarps];
  const int lane = threadIdx.x % kWarpSize;
  float largest = -INFINITY;
  for (int64_t v = begin + lane; v < end; v += kWarpSize) largest = fmaxf(largest, row[v]);
  largest = WarpMax(largest);
  if (lane == 0) scratch[threadIdx.x / kWarpSize] = largest;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) largest = fmaxf(largest, scratch[i]);
  return largest;
}

// Sum of the values of this lane and those below it.
__device__ __forceinline__ double WarpPrefixSum(double value) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const double below = __shfl_up_sync(kFullMask, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

// The first v of [begin, end) at which the running sum of weights exceeds `left`; the last one with
// a weight when rounding leaves none. Called by one whole warp.
template <typename T>
__device__ int64_t Walk(const Row<T>& row, float largest, int64_t begin, int64_t end, double left) {
  const int lane = threadIdx.x % kWarpSize;
  int64_t last = begin;
  double before = 0;
  for (int64_t step = begin; step < end; step += kWarpSize) {
    const int64_t v = step + lane;
    const float weight = v < end ? expf(row[v] - largest) : 0.0f;
    const double running = before + WarpPrefixSum(static_cast<double>(weight));
    const unsigned over = __ballot_sync(kFullMask, weight > 0 && running > left);
    if (over != 0) return step + __ffs(static_cast<int>(over)) - 1;
    const unsigned present = __ballot_sync(kFullMask, weight > 0);
    if (present != 0) last = step + kWarpSize - 1 - __clz(static_cast<int>(present));
    before = __shfl_sync(kFullMask, running, kWarpSize - 1);
  }
  return last;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    DrawRowsKernel(const T* __restrict__ logits, const int32_t* __restrict__ excluded,
                   int excluded_count, const double* __restrict__ uniforms, int64_t vocab,
                   int32_t* __restrict__ tokens) {
  __shared__ double sums[kWarps];
  const Row<T> row = {logits + blockIdx.x * vocab, excluded, excluded_count};
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t segment = (vocab + kWarps - 1) / kWarps;
  const int64_t begin = warp * segment, end = min(vocab, begin + segment);
  const float largest = BlockMax(row, begin, end);
  double sum = 0;
  for (int64_t v = begin + lane; v < end; v += kWarpSize) {
    sum += static_cast<double>(expf(row[v] - largest));
  }
  sum = WarpSum(sum);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (warp != 0) return;
  double total = 0;
  for (double part : sums) total += part;
  int64_t token = -1;
  if (isfinite(total)) {
    double before = 0, left = 0;
    const double wanted = uniforms[blockIdx.x] * total;
    int chosen = 0;  // the last segment with a sum when rounding leaves none that holds the token
    for (int i = 0; i < kWarps; ++i) {
      if (sums[i] == 0) continue;
      chosen = i;
      left = wanted - before;
      if (left < sums[i]) break;
      before += sums[i];
    }
    token = Walk(row, largest, chosen * segment, min(vocab, (chosen + 1) * segment), left);
  }
  if (lane == 0) tokens[blockIdx.x] = static_cast<int32_t>(token);
}

}  // namespace

cudaError_t LaunchDrawRows(const void* logits, DType dtype, const int32_t* excluded,
                           int excluded_count, const double* uniforms, int64_t rows, int64_t vocab,
                           int32_t* tokens, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    DrawRowsKernel<T><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
        static_cast<const T*>(logits), excluded, excluded_count, uniforms, vocab, tokens);
    return cudaGetLastError();
  });
}

}  // namespace quantmill::cuda
