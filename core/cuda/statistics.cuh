// Kernels of the calibration statistics; the products themselves are cuBLAS calls
// (backend_statistics.cc). CPU references: AccumulateGram, AccumulateAbs of core/cpu.
#ifndef QUANTMILL_CORE_CUDA_STATISTICS_CUH_
#define QUANTMILL_CORE_CUDA_STATISTICS_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/tensor/dtype.h"

namespace quantmill::cuda {

// matrix[i, j] = matrix[j, i] for i < j: fills the upper triangle of [n, n] from the lower.
cudaError_t LaunchMirrorLower(float* matrix, int64_t n, cudaStream_t stream);

// Rows that one partial sum of LaunchAbs covers; fixed, so that results do not depend on the GPU.
inline constexpr int64_t kAbsRows = 64;
// f32 elements of scratch LaunchAbs needs.
inline int64_t AbsScratch(int64_t rows, int64_t width) {
  return 2 * ((rows + kAbsRows - 1) / kAbsRows) * width;
}
// sum[i] += sum_r |x[r, i]|, maximum[i] = max(maximum[i], max_r |x[r, i]|); x: [rows, width].
// sum or maximum may be null.
cudaError_t LaunchAbs(const void* x, DType dtype, int64_t rows, int64_t width, float* scratch,
                      float* sum, float* maximum, cudaStream_t stream);

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_CUDA_STATISTICS_CUH_
