// Backward pass of RMS normalization, y_i = x_i r w_i with r = (mean_j x_j^2 + eps)^-1/2:
//
//   d_x_i = r w_i d_y_i - r^3 / width x_i sum_j d_y_j w_j x_j      (product and chain rule; r
//   depends
//                                                                  on every x_j)
//   d_w_i = sum over runs of d_y_i x_i r                           (column_sums.cu, given r)
//
// x: [runs, width] of the activation dtype, w: [width], d_y, d_x: f32 [runs, width]. CPU reference:
// NormRunBackward of cpu_ops.cc.
//
// Work: runs of up to kShortRun elements take one warp each, eight per block; longer ones a block
// each. Both sums in one pass over the run, a second pass (from L1/L2) writes d_x. A thread writes
// only elements that it alone reads in that pass, after the sums have met every thread of the run,
// so that d_x and d_y may be the same memory. Bound by memory: runs * width * (8 to 16 bytes).
//
// Versions
//   1  a block per run
//   2  a warp per short run (in use)
#include "core/cuda/kernel_common.cuh"
#include "core/train/backward_kernels.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kShortRun = 1024;

// Threads of a block for a run: whole warps, no more than the run can use.
int ThreadsFor(int64_t width) {
  return static_cast<int>(std::min<int64_t>(kThreads, CeilDiv(width, kWarpSize) * kWarpSize));
}

__device__ __forceinline__ float LoadWeight(const void* weight, DType dtype, int64_t i) {
  float value[1];
  LoadAs(weight, dtype, i, value);
  return value[0];
}

// One run; `thread` of `threads` strides over it. sum(x): over those threads, the same on each.
template <typename T, typename Sum>
__device__ __forceinline__ void RunBackward(const T* x, const void* weight, DType weight_dtype,
                                            const float* d_y, int64_t width, float eps, bool add,
                                            int thread, int threads, const Sum& sum, float* d_x) {
  float squares = 0;
  float dot = 0;
#pragma unroll 4
  for (int64_t i = thread; i < width; i += threads) {
    const float value = ToFloat(x[i]);
    squares += value * value;
    dot += d_y[i] * LoadWeight(weight, weight_dtype, i) * value;
  }
  squares = sum(squares);
  dot = sum(dot);
  const float n = static_cast<float>(width);
  const float r = 1.0f / sqrtf(squares / n + eps);
  const float slope = r * r * r * dot / n;
#pragma unroll 4
  for (int64_t i = thread; i < width; i += threads) {
    const float gradient = r * LoadWeight(weight, weight_dtype, i) * d_y[i] - slope * ToFloat(x[i]);
    d_x[i] = add ? d_x[i] + gradient : gradient;
  }
}

template <typename T>
__global__ void NormBackwardKernel2(const T* x, const void* weight, DType weight_dtype,
                                    const float* d_y, int64_t width, float eps, bool add,
                                    float* d_x) {
  __shared__ float scratch[kThreads / kWarpSize];
  const int64_t offset = blockIdx.x * width;
  RunBackward(
      x + offset, weight, weight_dtype, d_y + offset, width, eps, add,
      static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x),
      [&](float value) { return BlockSum(value, scratch); }, d_x + offset);
}

template <typename T>
__global__ void NormBackwardShortKernel2(const T* x, const void* weight, DType weight_dtype,
                                         const float* d_y, int64_t runs, int64_t width, float eps,
                                         bool add, float* d_x) {
  const int64_t run =
      blockIdx.x * static_cast<int64_t>(kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (run >= runs) return;
  const int64_t offset = run * width;
  RunBackward(
      x + offset, weight, weight_dtype, d_y + offset, width, eps, add,
      static_cast<int>(threadIdx.x) % kWarpSize, kWarpSize,
      [](float value) { return WarpSum(value); }, d_x + offset);
}

template <typename T>
__global__ void InverseRmsKernel1(const T* x, int64_t width, float eps, float* scale) {
  __shared__ float scratch[kThreads / kWarpSize];
  const int64_t offset = blockIdx.x * width;
  float squares = 0;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    const float value = ToFloat(x[offset + i]);
    squares += value * value;
  }
  squares = BlockSum(squares, scratch);
  if (threadIdx.x == 0) scale[blockIdx.x] = 1.0f / sqrtf(squares / static_cast<float>(width) + eps);
}

template <typename T>
__global__ void InverseRmsShortKernel2(const T* x, int64_t runs, int64_t width, float eps,
                                       float* scale) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t run =
      blockIdx.x * static_cast<int64_t>(kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (run >= runs) return;
  float squares = 0;
#pragma unroll 4
  for (int64_t i = lane; i < width; i += kWarpSize) {
    const float value = ToFloat(x[run * width + i]);
    squares += value * value;
  }
  squares = WarpSum(squares);
  if (lane == 0) scale[run] = 1.0f / sqrtf(squares / static_cast<float>(width) + eps);
}

}  // namespace

cudaError_t LaunchNormBackward(const NormBackward& norm, cudaStream_t stream) {
  if (norm.runs == 0 || norm.width == 0) return cudaSuccess;
  return DispatchFloat(norm.dtype, [&](auto t) {
    using T = decltype(t);
    const auto* x = static_cast<const T*>(norm.x);
    if (norm.width <= kShortRun) {
      const auto blocks = static_cast<unsigned>(CeilDiv(norm.runs, kThreads / kWarpSize));
      NormBackwardShortKernel2<T>
          <<<blocks, kThreads, 0, stream>>>(x, norm.weight, norm.weight_dtype, norm.d_y, norm.runs,
                                            norm.width, norm.eps, norm.add, norm.d_x);
    } else {
      NormBackwardKernel2<T>
          <<<static_cast<unsigned>(norm.runs), ThreadsFor(norm.width), 0, stream>>>(
              x, norm.weight, norm.weight_dtype, norm.d_y, norm.width, norm.eps, norm.add,
              norm.d_x);
    }
    return cudaGetLastError();
  });
}

cudaError_t LaunchInverseRms(const void* x, DType dtype, int64_t runs, int64_t width, float eps,
                             float* scale, cudaStream_t stream) {
  if (runs == 0 || width == 0) return cudaSuccess;
  return DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    const auto* rows = static_cast<const T*>(x);
    if (width <= kShortRun) {
      const auto blocks = static_cast<unsigned>(CeilDiv(runs, kThreads / kWarpSize));
      InverseRmsShortKernel2<T><<<blocks, kThreads, 0, stream>>>(rows, runs, width, eps, scale);
    } else {
      InverseRmsKernel1<T>
          <<<static_cast<unsigned>(runs), ThreadsFor(width), 0, stream>>>(rows, width, eps, scale);
    }
    return cudaGetLastError();
  });
}

}  // namespace quantmill::cuda
