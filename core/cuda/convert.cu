// Conversion between F32, F16 and BF16, and the difference of two tensors.
//
//   target[i] = round(source[i])            i in [0, count)
//   out[i]    = f32(a[i]) - f32(b[i])                           Difference
//   high[i] + middle[i] + low[i] = f32(a[i]) - f32(b[i])         DifferencePieces, all BF16
//
// Work: a grid-stride loop, four elements per thread and step (8 bytes on the 16-bit side, 16 on
// the f32 side); one element per step where a pointer is not aligned for that, and for the tail.
// Bound by memory: count * (source + target size) bytes. Exact but for the final rounding.
//
// Versions
//   1  one element per thread: 2-byte accesses leave most of each transaction's issue slots unused
//   2  four elements per thread (in use)
#include "core/cuda/convert.cuh"
#include "core/cuda/kernel_common.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kStep = 4;

template <typename S, typename T>
__global__ void ConvertKernel2(const S* __restrict__ source, T* __restrict__ target, int64_t count,
                               bool vectors) {
  const int64_t thread = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t steps = vectors ? count / kStep : 0;
  for (int64_t i = thread; i < steps; i += threads) {
    const Vec<S, kStep> in = reinterpret_cast<const Vec<S, kStep>*>(source)[i];
    Vec<T, kStep> out;
#pragma unroll
    for (int j = 0; j < kStep; ++j) out.v[j] = FromFloat<T>(ToFloat(in.v[j]));
    reinterpret_cast<Vec<T, kStep>*>(target)[i] = out;
  }
  for (int64_t i = steps * kStep + thread; i < count; i += threads) {
    target[i] = FromFloat<T>(ToFloat(source[i]));
  }
}

template <typename T>
__global__ void DifferenceKernel(const T* __restrict__ a, const T* __restrict__ b,
                                 float* __restrict__ out, int64_t count) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += threads) {
    out[i] = ToFloat(a[i]) - ToFloat(b[i]);
  }
}

__global__ void DifferencePiecesKernel(const __nv_bfloat16* __restrict__ a,
                                       const __nv_bfloat16* __restrict__ b,
                                       __nv_bfloat16* __restrict__ high,
                                       __nv_bfloat16* __restrict__ middle,
                                       __nv_bfloat16* __restrict__ low, int64_t count) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += threads) {
    float rest = ToFloat(a[i]) - ToFloat(b[i]);
    high[i] = FromFloat<__nv_bfloat16>(rest);
    rest -= ToFloat(high[i]);
    middle[i] = FromFloat<__nv_bfloat16>(rest);
    low[i] = FromFloat<__nv_bfloat16>(rest - ToFloat(middle[i]));
  }
}

}  // namespace

cudaError_t LaunchConvert(const void* source, DType source_dtype, void* target, DType target_dtype,
                          int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return DispatchFloat(source_dtype, [&](auto s) {
    return DispatchFloat(target_dtype, [&](auto t) {
      using S = decltype(s);
      using T = decltype(t);
      const bool vectors =
          Aligned(source, sizeof(Vec<S, kStep>)) && Aligned(target, sizeof(Vec<T, kStep>));
      ConvertKernel2<S, T><<<GridFor(CeilDiv(count, kStep), kThreads), kThreads, 0, stream>>>(
          static_cast<const S*>(source), static_cast<T*>(target), count, vectors);
      return cudaGetLastError();
    });
  });
}

cudaError_t LaunchDifference(const void* a, const void* b, DType dtype, float* out, int64_t count,
                             cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    DifferenceKernel<T><<<GridFor(count, kThreads), kThreads, 0, stream>>>(
        static_cast<const T*>(a), static_cast<const T*>(b), out, count);
    return cudaGetLastError();
  });
}

cudaError_t LaunchDifferencePieces(const void* a, const void* b, void* high, void* middle,
                                   void* low, int64_t count, cudaStream_t stream) {
  using T = __nv_bfloat16;
  if (count == 0) return cudaSuccess;
  DifferencePiecesKernel<<<GridFor(count, kThreads), kThreads, 0, stream>>>(
      static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(high),
      static_cast<T*>(middle), static_cast<T*>(low), count);
  return cudaGetLastError();
}

cudaError_t ProbeKernelImage() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, ConvertKernel2<float, float>);
}

}  // namespace quantmill::cuda
