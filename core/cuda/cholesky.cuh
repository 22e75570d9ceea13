// Kernels around cuSOLVER's Cholesky factor and triangular inverse (backend_linalg.cc). CPU
// reference: InverseCholesky of core/cpu.
#ifndef QUANTMILL_CORE_CUDA_CHOLESKY_CUH_
#define QUANTMILL_CORE_CUDA_CHOLESKY_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace quantmill::cuda {

// work = J (h + damp * mean(diag h) * I) J, J the reversal of the order: work[i, j] = h[n-1-i,
// n-1-j] (+ damping on the diagonal). h: f32 [n, n] with row stride `stride`; work: f32 [n, n]
// contiguous; mean: one f32, left with mean(diag h).
cudaError_t LaunchReverseDamped(const float* h, int64_t stride, int64_t n, double damp, float* work,
                                float* mean, cudaStream_t stream);

// out[i, j] = work[n-1-i, n-1-j] for i <= j, else 0; adds 1 to *bad for each upper entry that is
// not finite or diagonal entry that is not positive (*bad must start at 0).
cudaError_t LaunchReverseUpper(const float* work, int64_t n, float* out, int64_t stride, int* bad,
                               cudaStream_t stream);

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_CUDA_CHOLESKY_CUH_
