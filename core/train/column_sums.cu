// Sums over rows, for the gradients of biases and norm weights:
//
//   sums[j] += sum_i d_y[i, j]                          (bias)
//   sums[j] += sum_i d_y[i, j] x[i, j] scale[i]         (norm weight; scale = 1 / rms of run i)
//
// d_y: f32 [rows, columns], x: [rows, columns] of the activation dtype, sums: f32 [columns]. CPU
// reference: DoBiasGradient and DoRmsNorm of cpu_ops.cc.
//
// Work: the rows are cut in at most kChunks chunks; a thread sums one column of one chunk (loads of
// a warp are consecutive), a second kernel adds the chunks in order. No atomics, so that the order
// of sums is fixed. Bound by memory: rows * columns elements are read once.
//
// Versions
//   1  as described (in use)
#include "core/cuda/kernel_common.cuh"
#include "core/train/backward_kernels.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kChunks = 128;
constexpr int64_t kRowsPerChunk = 32;  // at least

int64_t ChunkRows(int64_t rows) { return std::max(kRowsPerChunk, CeilDiv(rows, kChunks)); }

// grid: (column tiles, chunks). x == nullptr: plain sums.
template <typename T>
__global__ void PartialSumsKernel1(const float* d_y, const T* x, const float* scale, int64_t rows,
                                   int64_t columns, int64_t chunk_rows, float* partial) {
  const int64_t column = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (column >= columns) return;
  const int64_t begin = blockIdx.y * chunk_rows;
  const int64_t end = begin + chunk_rows < rows ? begin + chunk_rows : rows;
  float sum = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * columns + column;
    sum += x == nullptr ? d_y[at] : d_y[at] * ToFloat(x[at]) * scale[row];
  }
  partial[blockIdx.y * columns + column] = sum;
}

__global__ void AddPartialsKernel1(const float* partial, int64_t chunks, int64_t columns,
                                   float* sums) {
  const int64_t column = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (column >= columns) return;
  float sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * columns + column];
  sums[column] += sum;
}

template <typename T>
cudaError_t Sum(const float* d_y, const T* x, const float* scale, int64_t rows, int64_t columns,
                float* partial, float* sums, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  const int64_t chunk_rows = ChunkRows(rows);
  const int64_t chunks = CeilDiv(rows, chunk_rows);
  const auto tiles = static_cast<unsigned>(CeilDiv(columns, kThreads));
  PartialSumsKernel1<T><<<dim3(tiles, static_cast<unsigned>(chunks)), kThreads, 0, stream>>>(
      d_y, x, scale, rows, columns, chunk_rows, partial);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  AddPartialsKernel1<<<tiles, kThreads, 0, stream>>>(partial, chunks, columns, sums);
  return cudaGetLastError();
}

}  // namespace

int64_t ColumnPartials(int64_t rows, int64_t columns) {
  return CeilDiv(rows, ChunkRows(rows)) * columns;
}

cudaError_t LaunchColumnSums(const float* d_y, int64_t rows, int64_t columns, float* partial,
                             float* sums, cudaStream_t stream) {
  return Sum<float>(d_y, nullptr, nullptr, rows, columns, partial, sums, stream);
}

cudaError_t LaunchScaledColumnSums(const float* d_y, const void* x, DType dtype, const float* scale,
                                   int64_t rows, int64_t columns, float* partial, float* sums,
                                   cudaStream_t stream) {
  return DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    return Sum(d_y, static_cast<const T*>(x), scale, rows, columns, partial, sums, stream);
  });
}

}  // namespace quantmill::cuda
