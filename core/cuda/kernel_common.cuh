// What all kernels share: conversions between storage types and f32, vector access, reductions and
// the choice of a template instance by dtype. Included by .cu files only.
#ifndef QUANTMILL_CORE_CUDA_KERNEL_COMMON_CUH_
#define QUANTMILL_CORE_CUDA_KERNEL_COMMON_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "core/tensor/dtype.h"

namespace quantmill::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(__half x) { return __half2float(x); }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T FromFloat(float x);
template <>
__device__ __forceinline__ float FromFloat<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half FromFloat<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 FromFloat<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// N elements moved by one load or store; N * sizeof(T) is a power of two up to 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};
// Elements in 16 bytes.
template <typename T>
inline constexpr int kVec16 = 16 / static_cast<int>(sizeof(T));

// N consecutive values as f32, whatever their storage type. `dtype` is the same for the whole
// launch, so the branch never diverges. `index` is a multiple of N, data aligned to N elements.
template <int N>
__device__ __forceinline__ void LoadAs(const void* data, DType dtype, int64_t index,
                                       float (&out)[N]) {
  if (dtype == DType::kF32) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = static_cast<const float*>(data)[index + i];
  } else if (dtype == DType::kF16) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = ToFloat(static_cast<const __half*>(data)[index + i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[i] = ToFloat(static_cast<const __nv_bfloat16*>(data)[index + i]);
    }
  }
}

template <typename T>
__device__ __forceinline__ T WarpSum(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

__device__ __forceinline__ float WarpMax(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullMask, value, offset));
  }
  return value;
}

// Sum over the block, the same on every thread; `scratch` holds one value per warp. The order of
// the sum is fixed. Ends with a barrier, so scratch may be used again at once.
template <typename T>
__device__ __forceinline__ T BlockSum(T value, T* scratch) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int warps = (blockDim.x + kWarpSize - 1) / kWarpSize;
  value = WarpSum(value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  T total = scratch[0];
  for (int i = 1; i < warps; ++i) total += scratch[i];
  __syncthreads();
  return total;
}

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for a grid-stride loop over `items`: enough to fill any GPU, few enough to start quickly.
inline unsigned GridFor(int64_t items, int threads) {
  return static_cast<unsigned>(std::clamp<int64_t>(CeilDiv(items, threads), 1, 132 * 32));
}

inline bool Aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Calls f with a value of the C++ type of a model float dtype; f returns cudaError_t.
template <typename F>
cudaError_t DispatchFloat(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f(float{});
    case DType::kF16:
      return f(__half{});
    case DType::kBF16:
      return f(__nv_bfloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_CUDA_KERNEL_COMMON_CUH_
