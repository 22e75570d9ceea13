// Differences of activations, for a mean squared error, and the scale of its gradient:
//
//   out = a - b,  x *= scale        a, b: activation dtype; out, x: f32
//
// CPU references: DoDifference, DoScale of cpu_ops.cc.
//
// Work: grid-stride loops, one element per thread and step. Bound by memory.
//
// Versions
//   1  as described (in use)
#include "core/cuda/kernel_common.cuh"
#include "core/train/backward_kernels.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void DifferenceKernel1(const T* a, const T* b, int64_t count, float* out) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += threads) {
    out[i] = ToFloat(a[i]) - ToFloat(b[i]);
  }
}

__global__ void ScaleKernel1(float scale, int64_t count, float* x) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += threads) {
    x[i] *= scale;
  }
}

}  // namespace

cudaError_t LaunchDifference(const void* a, const void* b, DType dtype, int64_t count, float* out,
                             cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    DifferenceKernel1<T><<<GridFor(count, kThreads), kThreads, 0, stream>>>(
        static_cast<const T*>(a), static_cast<const T*>(b), count, out);
    return cudaGetLastError();
  });
}

cudaError_t LaunchScaleF32(float scale, int64_t count, float* x, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  ScaleKernel1<<<GridFor(count, kThreads), kThreads, 0, stream>>>(scale, count, x);
  return cudaGetLastError();
}

}  // namespace quantmill::cuda
