// What training a whole model needs besides the backward passes of its layers:
//
//   embedding   table[ids[i], :] += d_rows[i, :], rows in order
//   norm        sum of x^2, for clipping
//   AdamW       m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
//               p = keep p - rate m / (sqrt(v) root + epsilon)     (factors: FactorsOf)
//
// All f32. CPU references: DoEmbed, DoSumOfSquares, DoAdamW of cpu_ops.cc.
//
// Work: the embedding gives every column of the table to one thread, which goes through the rows in
// order: no atomics, so that equal ids add up in a fixed order; loads of a warp are consecutive.
// Sums of squares go to a fixed number of partial sums in f64 (one per block) and from there, by
// one block, to the total. AdamW is element-wise: 28 bytes per element, bound by memory.
//
// Versions
//   1  as described (in use)
#include "core/cuda/kernel_common.cuh"
#include "core/train/backward_kernels.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void EmbedBackwardKernel1(const int32_t* ids, const float* d_rows, int64_t rows,
                                     int64_t width, float* table) {
  const int64_t column = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (column >= width) return;
  for (int64_t row = 0; row < rows; ++row) {
    table[ids[row] * width + column] += d_rows[row * width + column];
  }
}

__global__ void PartialSquaresKernel1(const float* x, int64_t count, double* partial) {
  __shared__ double scratch[kThreads / kWarpSize];
  double sum = 0;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    sum += static_cast<double>(x[i]) * x[i];
  }
  sum = BlockSum(sum, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void TotalKernel1(const double* partial, int count, double* total) {
  __shared__ double scratch[kThreads / kWarpSize];
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = BlockSum(sum, scratch);
  if (threadIdx.x == 0) *total = sum;
}

__global__ void AdamWKernel1(AdamWFactors f, const float* gradient, int64_t count, float* p,
                             float* first, float* second) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += threads) {
    const float g = gradient[i] * f.gradient_scale;
    const float m = f.beta1 * first[i] + f.rest1 * g;
    const float v = f.beta2 * second[i] + f.rest2 * g * g;
    first[i] = m;
    second[i] = v;
    p[i] = p[i] * f.keep - f.rate * m / (sqrtf(v) * f.root + f.epsilon);
  }
}

}  // namespace

cudaError_t LaunchEmbedBackward(const int32_t* ids, const float* d_rows, int64_t rows,
                                int64_t width, float* table, cudaStream_t stream) {
  if (rows == 0 || width == 0) return cudaSuccess;
  EmbedBackwardKernel1<<<static_cast<unsigned>(CeilDiv(width, kThreads)), kThreads, 0, stream>>>(
      ids, d_rows, rows, width, table);
  return cudaGetLastError();
}

cudaError_t LaunchSumOfSquares(const float* x, int64_t count, double* partial, double* total,
                               cudaStream_t stream) {
  PartialSquaresKernel1<<<kSquarePartials, kThreads, 0, stream>>>(x, count, partial);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  TotalKernel1<<<1, kThreads, 0, stream>>>(partial, kSquarePartials, total);
  return cudaGetLastError();
}

cudaError_t LaunchAdamW(const AdamWFactors& factors, const float* gradient, int64_t count, float* p,
                        float* first, float* second, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  AdamWKernel1<<<GridFor(count, kThreads), kThreads, 0, stream>>>(factors, gradient, count, p,
                                                                  first, second);
  return cudaGetLastError();
}

}  // namespace quantmill::cuda
