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
// Work: one block per run, both sums in one pass over the run, a second pass (from L1/L2) writes
// d_x. A thread writes only elements that it alone reads in that pass, after the barriers of the
// sums, so that d_x and d_y may be the same memory. Bound by memory: runs * width * (8 to 16
// bytes).
//
// Versions
//   1  as described (in use)
#include "core/cuda/kernel_common.cuh"
#include "core/train/backward_kernels.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 256;

// Threads of a block for a run: whole warps, no more than the run can use.
int ThreadsFor(int64_t width) {
  return static_cast<int>(std::min<int64_t>(kThreads, CeilDiv(width, kWarpSize) * kWarpSize));
}

__device__ __forceinline__ float LoadWeight(const void* weight, DType dtype, int64_t i) {
  float value[1];
  LoadAs(weight, dtype, i, value);
  return value[0];
}

template <typename T>
__global__ void NormBackwardKernel1(const T* x, const void* weight, DType weight_dtype,
                                    const float* d_y, int64_t width, float eps, bool add,
                                    float* d_x) {
  __shared__ float scratch[kThreads / kWarpSize];
  const int64_t offset = blockIdx.x * width;
  float squares = 0;
  float dot = 0;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    const float value = ToFloat(x[offset + i]);
    squares += value * value;
    dot += d_y[offset + i] * LoadWeight(weight, weight_dtype, i) * value;
  }
  squares = BlockSum(squares, scratch);
  dot = BlockSum(dot, scratch);
  const float n = static_cast<float>(width);
  const float r = 1.0f / sqrtf(squares / n + eps);
  const float slope = r * r * r * dot / n;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    const float gradient =
        r * LoadWeight(weight, weight_dtype, i) * d_y[offset + i] - slope * ToFloat(x[offset + i]);
    d_x[offset + i] = add ? d_x[offset + i] + gradient : gradient;
  }
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

}  // namespace

cudaError_t LaunchNormBackward(const NormBackward& norm, cudaStream_t stream) {
  if (norm.runs == 0 || norm.width == 0) return cudaSuccess;
  return DispatchFloat(norm.dtype, [&](auto t) {
    using T = decltype(t);
    NormBackwardKernel1<T><<<static_cast<unsigned>(norm.runs), ThreadsFor(norm.width), 0, stream>>>(
        static_cast<const T*>(norm.x), norm.weight, norm.weight_dtype, norm.d_y, norm.width,
        norm.eps, norm.add, norm.d_x);
    return cudaGetLastError();
  });
}

cudaError_t LaunchInverseRms(const void* x, DType dtype, int64_t runs, int64_t width, float eps,
                             float* scale, cudaStream_t stream) {
  if (runs == 0 || width == 0) return cudaSuccess;
  return DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    InverseRmsKernel1<T><<<static_cast<unsigned>(runs), ThreadsFor(width), 0, stream>>>(
        static_cast<const T*>(x), width, eps, scale);
    return cudaGetLastError();
  });
}

}  // namespace quantmill::cuda
