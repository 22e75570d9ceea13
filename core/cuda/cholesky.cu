// Kernels around cuSOLVER's Cholesky factor and triangular inverse.
//
// With J the matrix that reverses the order of the basis, J A J = L L^T gives
//   A = (J L J)(J L J)^T,   J L J upper triangular,
//   A^-1 = U^T U            with U = (J L J)^-1 = J L^-1 J, upper triangular.
// So one Cholesky factor and one triangular inverse suffice (2/3 n^3 operations), where factoring
// A, inverting it and factoring again (as the reference code of Frantar et al. 2022 does) takes
// twice that and squares the condition number on the way.
//
//   ReverseDamped  work = J (h + damp * mean(diag h) * I) J
//   ReverseUpper   out = J work J on and above the diagonal, 0 below; counts unusable entries
//
// J M J of a contiguous [n, n] matrix is its memory backwards. Work: one thread per element in a
// grid-stride loop; reads run backwards and stay coalesced. Bound by memory. The mean is one
// block's sum in f64, in a fixed order.
#include "core/cuda/cholesky.cuh"
#include "core/cuda/kernel_common.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void DiagonalMeanKernel(const float* __restrict__ h, int64_t stride, int64_t n,
                                   float* __restrict__ mean) {
  __shared__ double scratch[kThreads / kWarpSize];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    sum += static_cast<double>(h[i * stride + i]);
  }
  sum = BlockSum(sum, scratch);
  if (threadIdx.x == 0) *mean = static_cast<float>(sum / static_cast<double>(n));
}

__global__ void ReverseDampedKernel(const float* __restrict__ h, int64_t stride, int64_t n,
                                    double damp, const float* __restrict__ mean,
                                    float* __restrict__ work) {
  const float added = static_cast<float>(damp * static_cast<double>(*mean));
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; e < n * n;
       e += threads) {
    const int64_t i = n - 1 - e / n;
    const int64_t j = n - 1 - e % n;
    work[e] = h[i * stride + j] + (i == j ? added : 0.0f);
  }
}

__global__ void ReverseUpperKernel(const float* __restrict__ work, int64_t n,
                                   float* __restrict__ out, int64_t stride, int* __restrict__ bad) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; e < n * n;
       e += threads) {
    const int64_t i = e / n;
    const int64_t j = e % n;
    float value = 0;
    if (i <= j) {
      value = work[n * n - 1 - e];
      if (!isfinite(value) || (i == j && !(value > 0))) atomicAdd(bad, 1);
    }
    out[i * stride + j] = value;
  }
}

}  // namespace

cudaError_t LaunchReverseDamped(const float* h, int64_t stride, int64_t n, double damp, float* work,
                                float* mean, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  DiagonalMeanKernel<<<1, kThreads, 0, stream>>>(h, stride, n, mean);
  ReverseDampedKernel<<<GridFor(n * n, kThreads), kThreads, 0, stream>>>(h, stride, n, damp, mean,
                                                                         work);
  return cudaGetLastError();
}

cudaError_t LaunchReverseUpper(const float* work, int64_t n, float* out, int64_t stride, int* bad,
                               cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  ReverseUpperKernel<<<GridFor(n * n, kThreads), kThreads, 0, stream>>>(work, n, out, stride, bad);
  return cudaGetLastError();
}

}  // namespace quantmill::cuda
