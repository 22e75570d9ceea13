// Element-wise steps of a decoder block.
//
//   SiluMultiply  out[i] = gate[i] * sigmoid(gate[i]) * up[i]
//   Add           target[i] += x[i]
//   AddBias       x[r, i] += bias[i]
//
// Computed in f32, rounded once. Work: a grid-stride loop with 16 bytes per thread and step; one
// element per step where alignment forbids it, and for the tail. Bound by memory: three passes over
// `count` elements (two for AddBias). Every element is read and written by one thread only, so that
// the output may be one of the inputs.
//
// Versions
//   1  one element per thread
//   2  16 bytes per thread and step (in use)
#include "core/cuda/elementwise.cuh"
#include "core/cuda/kernel_common.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 256;

struct SiluProduct {
  __device__ float operator()(float gate, float up) const {
    return gate / (1.0f + expf(-gate)) * up;
  }
};

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};

template <typename T, typename Op>
__global__ void BinaryKernel2(const T* a, const T* b, int64_t count, bool vectors, T* out) {
  constexpr int kN = kVec16<T>;
  const Op op;
  const int64_t thread = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t steps = vectors ? count / kN : 0;
  for (int64_t i = thread; i < steps; i += threads) {
    const auto left = reinterpret_cast<const Vec<T, kN>*>(a)[i];
    const auto right = reinterpret_cast<const Vec<T, kN>*>(b)[i];
    Vec<T, kN> result;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      result.v[j] = FromFloat<T>(op(ToFloat(left.v[j]), ToFloat(right.v[j])));
    }
    reinterpret_cast<Vec<T, kN>*>(out)[i] = result;
  }
  for (int64_t i = steps * kN + thread; i < count; i += threads) {
    out[i] = FromFloat<T>(op(ToFloat(a[i]), ToFloat(b[i])));
  }
}

template <typename T, int N>
__global__ void AddBiasKernel2(const void* bias, DType bias_dtype, int64_t count, int64_t width,
                               T* x) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count / N;
       i += threads) {
    float b[N];
    LoadAs(bias, bias_dtype, i * N % width, b);
    auto* place = reinterpret_cast<Vec<T, N>*>(x) + i;
    Vec<T, N> value = *place;
#pragma unroll
    for (int j = 0; j < N; ++j) value.v[j] = FromFloat<T>(ToFloat(value.v[j]) + b[j]);
    *place = value;
  }
}

template <typename Op>
cudaError_t LaunchBinary(const void* a, const void* b, DType dtype, int64_t count, void* out,
                         cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    const bool vectors = Aligned(a, 16) && Aligned(b, 16) && Aligned(out, 16);
    BinaryKernel2<T, Op><<<GridFor(CeilDiv(count, kVec16<T>), kThreads), kThreads, 0, stream>>>(
        static_cast<const T*>(a), static_cast<const T*>(b), count, vectors, static_cast<T*>(out));
    return cudaGetLastError();
  });
}

}  // namespace

cudaError_t LaunchSiluMultiply(const void* gate, const void* up, DType dtype, int64_t count,
                               void* out, cudaStream_t stream) {
  return LaunchBinary<SiluProduct>(gate, up, dtype, count, out, stream);
}

cudaError_t LaunchAdd(const void* x, DType dtype, int64_t count, void* target,
                      cudaStream_t stream) {
  return LaunchBinary<Sum>(target, x, dtype, count, target, stream);
}

cudaError_t LaunchAddBias(const void* bias, DType bias_dtype, DType dtype, int64_t rows,
                          int64_t width, void* x, cudaStream_t stream) {
  const int64_t count = rows * width;
  if (count == 0) return cudaSuccess;
  return DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int kN = kVec16<T>;
    if (width % kN == 0 && Aligned(x, 16)) {
      AddBiasKernel2<T, kN><<<GridFor(count / kN, kThreads), kThreads, 0, stream>>>(
          bias, bias_dtype, count, width, static_cast<T*>(x));
    } else {
      AddBiasKernel2<T, 1><<<GridFor(count, kThreads), kThreads, 0, stream>>>(
          bias, bias_dtype, count, width, static_cast<T*>(x));
    }
    return cudaGetLastError();
  });
}

}  // namespace quantmill::cuda
