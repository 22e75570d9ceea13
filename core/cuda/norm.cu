// RMS normalization (Zhang and Sennrich 2019, section 3).
//
//   out[r, i] = x[r, i] * rsqrt(mean_j x[r, j]^2 + eps) * weight[i]
//
// x, out: [rows, width], weight: [width]. Sums in f32, one rounding at the end.
//
// Work: rows of up to 256 elements (the q/k norms, width = head_dim) take one warp each, eight per
// block; longer rows one block each. Steps of 16 bytes per thread where width and pointers allow.
// A row is read twice; the second read comes from L1/L2. Bound by memory: 2 * rows * width
// elements. A thread reads an element before it writes it, and no other thread does, so that x and
// out may be the same memory.
//
// Versions
//   1  one block per row, scalar access
//   2  16-byte access, a warp per short row (in use). H100 80GB HBM3, 2026-11-22, BF16: 2110 GB/s
//      at 2048 x 4096, 1930 at 65536 x 128.
#include "core/cuda/kernel_common.cuh"
#include "core/cuda/norm.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kShortRow = 256;

// Sum of squares of the elements that fall to `thread` of `threads`.
template <typename T, int N>
__device__ __forceinline__ float SquareSum(const T* row, int64_t width, int thread, int threads) {
  float sum = 0;
  for (int64_t i = static_cast<int64_t>(thread) * N; i < width;
       i += static_cast<int64_t>(threads) * N) {
    const Vec<T, N> in = *reinterpret_cast<const Vec<T, N>*>(row + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float value = ToFloat(in.v[j]);
      sum += value * value;
    }
  }
  return sum;
}

template <typename T, int N>
__device__ __forceinline__ void Scale(const T* row, const void* weight, DType weight_dtype,
                                      float factor, int64_t width, int thread, int threads,
                                      T* out) {
  for (int64_t i = static_cast<int64_t>(thread) * N; i < width;
       i += static_cast<int64_t>(threads) * N) {
    const Vec<T, N> in = *reinterpret_cast<const Vec<T, N>*>(row + i);
    float w[N];
    LoadAs(weight, weight_dtype, i, w);
    Vec<T, N> result;
#pragma unroll
    for (int j = 0; j < N; ++j) result.v[j] = FromFloat<T>(ToFloat(in.v[j]) * factor * w[j]);
    *reinterpret_cast<Vec<T, N>*>(out + i) = result;
  }
}

template <typename T, int N>
__global__ void RmsNormKernel2(const T* x, const void* weight, DType weight_dtype, float eps,
                               int64_t width, T* out) {
  __shared__ float scratch[kThreads / kWarpSize];
  const int64_t offset = blockIdx.x * width;
  const float sum = BlockSum(SquareSum<T, N>(x + offset, width, threadIdx.x, blockDim.x), scratch);
  const float factor = rsqrtf(sum / static_cast<float>(width) + eps);
  Scale<T, N>(x + offset, weight, weight_dtype, factor, width, threadIdx.x, blockDim.x,
              out + offset);
}

template <typename T, int N>
__global__ void RmsNormShortKernel2(const T* x, const void* weight, DType weight_dtype, float eps,
                                    int64_t rows, int64_t width, T* out) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row =
      blockIdx.x * static_cast<int64_t>(kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row >= rows) return;
  const int64_t offset = row * width;
  const float sum = WarpSum(SquareSum<T, N>(x + offset, width, lane, kWarpSize));
  const float factor = rsqrtf(sum / static_cast<float>(width) + eps);
  Scale<T, N>(x + offset, weight, weight_dtype, factor, width, lane, kWarpSize, out + offset);
}

template <typename T, int N>
cudaError_t Launch(const void* x, const void* weight, DType weight_dtype, float eps, int64_t rows,
                   int64_t width, void* out, cudaStream_t stream) {
  const T* in = static_cast<const T*>(x);
  if (width <= kShortRow) {
    const auto blocks = static_cast<unsigned>(CeilDiv(rows, kThreads / kWarpSize));
    RmsNormShortKernel2<T, N><<<blocks, kThreads, 0, stream>>>(in, weight, weight_dtype, eps, rows,
                                                               width, static_cast<T*>(out));
  } else {
    RmsNormKernel2<T, N><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
        in, weight, weight_dtype, eps, width, static_cast<T*>(out));
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchRmsNorm(const void* x, DType dtype, const void* weight, DType weight_dtype,
                          float eps, int64_t rows, int64_t width, void* out, cudaStream_t stream) {
  if (rows == 0 || width == 0) return cudaSuccess;
  return DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int kN = kVec16<T>;
    if (width % kN == 0 && Aligned(x, 16) && Aligned(out, 16)) {
      return Launch<T, kN>(x, weight, weight_dtype, eps, rows, width, out, stream);
    }
    return Launch<T, 1>(x, weight, weight_dtype, eps, rows, width, out, stream);
  });
}

}  // namespace quantmill::cuda
