// Largest magnitude of each column of a weight.
//
//   maximum[j] = max(maximum[j], max_row |weight[row, j]|),  weight f32 [rows, columns]
//
// A block handles 256 columns and 64 rows, a thread one column of them: neighbouring threads read
// neighbouring addresses. Maxima of non-negative floats are those of their bits, so that atomicMax
// on integers joins the blocks, in any order with the same result. CPU reference: smooth.cc.
#include "quantmill/sdk/cuda.hpp"
#include "smooth.h"

namespace quantmill::ptq {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = 64;

__global__ void __launch_bounds__(kThreads)
    column_maximum_kernel1(const float* __restrict__ weight, int64_t rows, int64_t columns,
                           int64_t stride, float* __restrict__ maximum) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= columns) return;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kRowsPerBlock;
  const int64_t last = first + kRowsPerBlock < rows ? first + kRowsPerBlock : rows;
  float largest = 0.0f;
  for (int64_t row = first; row < last; ++row) {
    largest = fmaxf(largest, fabsf(weight[row * stride + column]));
  }
  atomicMax(reinterpret_cast<int*>(maximum + column), __float_as_int(largest));
}

}  // namespace

qm_status ColumnMaximumCuda(qm_call* call, qm_tensor weight, float* maximum) {
  const int64_t rows = weight.shape[0], columns = weight.shape[1];
  // Rows go along the grid's second axis, which ends at 65535 blocks: 4 million rows.
  constexpr int64_t kMostRows = int64_t{65535} * kRowsPerBlock;
  for (int64_t row = 0; row < rows; row += kMostRows) {
    const int64_t part = rows - row < kMostRows ? rows - row : kMostRows;
    const dim3 grid(static_cast<unsigned>((columns + kThreads - 1) / kThreads),
                    static_cast<unsigned>((part + kRowsPerBlock - 1) / kRowsPerBlock));
    column_maximum_kernel1<<<grid, kThreads, 0, qm::Stream(call)>>>(
        static_cast<const float*>(weight.data) + row * weight.stride[0], part, columns,
        weight.stride[0], maximum);
    QM_CUDA(call, cudaGetLastError());
  }
  return QM_OK;
}

}  // namespace quantmill::ptq
