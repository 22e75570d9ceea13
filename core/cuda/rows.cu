// Gathering and scattering of rows: embedding lookup, and the tokens of one expert.
//
//   Gather      out[i, :] = source[index[i], :]
//   ScatterAdd  target[index[i], :] += weights[i] * x[i, :]      (indices distinct: no atomics)
//
// source: [any, width]; x, out: [count, width]. Computed in f32, rounded once.
//
// Work: one block per row i, N elements per thread and step (16 bytes of the narrower type where
// width and pointers allow, else one). Bound by memory.
//
// Versions
//   1  one element per thread and step
//   2  N elements per thread and step (in use)
#include "core/cuda/kernel_common.cuh"
#include "core/cuda/rows.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 128;

template <typename S, typename T, int N>
__global__ void GatherRowsKernel2(const S* __restrict__ source, const int32_t* __restrict__ index,
                                  int64_t width, T* __restrict__ out) {
  const S* from = source + index[blockIdx.x] * width;
  T* to = out + blockIdx.x * width;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < width; i += kThreads * N) {
    const Vec<S, N> in = *reinterpret_cast<const Vec<S, N>*>(from + i);
    Vec<T, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) result.v[j] = FromFloat<T>(ToFloat(in.v[j]));
    *reinterpret_cast<Vec<T, N>*>(to + i) = result;
  }
}

template <typename T, int N>
__global__ void ScatterAddRowsKernel2(const T* __restrict__ x, const int32_t* __restrict__ index,
                                      const float* __restrict__ weights, int64_t width,
                                      T* __restrict__ target) {
  const T* from = x + blockIdx.x * width;
  T* to = target + index[blockIdx.x] * width;
  const float weight = weights[blockIdx.x];
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * N; i < width; i += kThreads * N) {
    const Vec<T, N> in = *reinterpret_cast<const Vec<T, N>*>(from + i);
    Vec<T, N> sum = *reinterpret_cast<const Vec<T, N>*>(to + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sum.v[j] = FromFloat<T>(ToFloat(sum.v[j]) + weight * ToFloat(in.v[j]));
    }
    *reinterpret_cast<Vec<T, N>*>(to + i) = sum;
  }
}

}  // namespace

cudaError_t LaunchGatherRows(const void* source, DType source_dtype, const int32_t* index,
                             int64_t count, int64_t width, void* out, DType dtype,
                             cudaStream_t stream) {
  if (count == 0 || width == 0) return cudaSuccess;
  return DispatchFloat(source_dtype, [&](auto s) {
    return DispatchFloat(dtype, [&](auto t) {
      using S = decltype(s);
      using T = decltype(t);
      constexpr int kN = kVec16<S> < kVec16<T> ? kVec16<S> : kVec16<T>;
      const auto blocks = static_cast<unsigned>(count);
      const S* from = static_cast<const S*>(source);
      if (width % kN == 0 && Aligned(source, 16) && Aligned(out, 16)) {
        GatherRowsKernel2<S, T, kN>
            <<<blocks, kThreads, 0, stream>>>(from, index, width, static_cast<T*>(out));
      } else {
        GatherRowsKernel2<S, T, 1>
            <<<blocks, kThreads, 0, stream>>>(from, index, width, static_cast<T*>(out));
      }
      return cudaGetLastError();
    });
  });
}

cudaError_t LaunchScatterAddRows(const void* x, const int32_t* index, const float* weights,
                                 int64_t count, int64_t width, void* target, DType dtype,
                                 cudaStream_t stream) {
  if (count == 0 || width == 0) return cudaSuccess;
  return DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int kN = kVec16<T>;
    const auto blocks = static_cast<unsigned>(count);
    const T* from = static_cast<const T*>(x);
    if (width % kN == 0 && Aligned(x, 16) && Aligned(target, 16)) {
      ScatterAddRowsKernel2<T, kN>
          <<<blocks, kThreads, 0, stream>>>(from, index, weights, width, static_cast<T*>(target));
    } else {
      ScatterAddRowsKernel2<T, 1>
          <<<blocks, kThreads, 0, stream>>>(from, index, weights, width, static_cast<T*>(target));
    }
    return cudaGetLastError();
  });
}

}  // namespace quantmill::cuda
