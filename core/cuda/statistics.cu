// Kernels of the calibration statistics.
//
//   MirrorLower  matrix[i, j] = matrix[j, i] for i < j                     [n, n] f32
//   Abs          sum[i] += sum_r |x[r, i]|, maximum[i] = max(maximum[i], max_r |x[r, i]|)
//
// MirrorLower: a block of 32 x 8 threads per 32 x 32 tile of the lower triangle, transposed through
// shared memory (one column of padding against bank conflicts) so that reads and writes are both
// coalesced. Bound by memory: n^2 / 2 reads and writes.
//
// Abs: a thread per column and per kAbsRows rows makes a partial sum and maximum; a second kernel
// adds the partials of a column in order, then the old value. Sums in f32. Bound by memory: one
// read of x.
#include "core/cuda/kernel_common.cuh"
#include "core/cuda/statistics.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kTile = 32;
constexpr int kTileRows = 8;
constexpr int kThreads = 128;

__global__ void MirrorLowerKernel(float* __restrict__ matrix, int64_t n) {
  if (blockIdx.x > blockIdx.y) return;  // tile columns beyond the diagonal
  __shared__ float tile[kTile][kTile + 1];
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kTile;
  for (int r = threadIdx.y; r < kTile; r += kTileRows) {
    const int64_t row = row0 + r;
    const int64_t column = column0 + threadIdx.x;
    if (row < n && column < n) tile[r][threadIdx.x] = matrix[row * n + column];
  }
  __syncthreads();
  for (int r = threadIdx.y; r < kTile; r += kTileRows) {
    const int64_t row = column0 + r;  // of the mirrored tile
    const int64_t column = row0 + threadIdx.x;
    if (row < column && column < n) matrix[row * n + column] = tile[threadIdx.x][r];
  }
}

template <typename T>
__global__ void AbsPartialKernel(const T* __restrict__ x, int64_t rows, int64_t width,
                                 float* __restrict__ sums, float* __restrict__ maxima) {
  const int64_t column = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (column >= width) return;
  const int64_t begin = blockIdx.y * kAbsRows;
  const int64_t end = min(begin + kAbsRows, rows);
  float sum = 0;
  float maximum = 0;
#pragma unroll 8
  for (int64_t r = begin; r < end; ++r) {
    const float value = fabsf(ToFloat(x[r * width + column]));
    sum += value;
    // Not fmaxf: a NaN must stay visible.
    maximum = value <= maximum ? maximum : value;
  }
  sums[blockIdx.y * width + column] = sum;
  maxima[blockIdx.y * width + column] = maximum;
}

__global__ void AbsCombineKernel(const float* __restrict__ sums, const float* __restrict__ maxima,
                                 int64_t partials, int64_t width, float* __restrict__ sum,
                                 float* __restrict__ maximum) {
  const int64_t column = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (column >= width) return;
  float total = 0;
  float largest = 0;
  for (int64_t i = 0; i < partials; ++i) {
    total += sums[i * width + column];
    const float value = maxima[i * width + column];
    largest = value <= largest ? largest : value;
  }
  if (sum != nullptr) sum[column] += total;
  if (maximum != nullptr && !(largest <= maximum[column])) maximum[column] = largest;
}

}  // namespace

cudaError_t LaunchMirrorLower(float* matrix, int64_t n, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const auto tiles = static_cast<unsigned>(CeilDiv(n, kTile));
  MirrorLowerKernel<<<dim3(tiles, tiles), dim3(kTile, kTileRows), 0, stream>>>(matrix, n);
  return cudaGetLastError();
}

cudaError_t LaunchAbs(const void* x, DType dtype, int64_t rows, int64_t width, float* scratch,
                      float* sum, float* maximum, cudaStream_t stream) {
  if (rows == 0 || width == 0) return cudaSuccess;
  const int64_t partials = CeilDiv(rows, kAbsRows);
  const auto columns = static_cast<unsigned>(CeilDiv(width, kThreads));
  float* maxima = scratch + partials * width;
  const cudaError_t error = DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    AbsPartialKernel<T><<<dim3(columns, static_cast<unsigned>(partials)), kThreads, 0, stream>>>(
        static_cast<const T*>(x), rows, width, scratch, maxima);
    return cudaGetLastError();
  });
  if (error != cudaSuccess) return error;
  AbsCombineKernel<<<columns, kThreads, 0, stream>>>(scratch, maxima, partials, width, sum,
                                                     maximum);
  return cudaGetLastError();
}

}  // namespace quantmill::cuda
