// Scoring of logits, one block per row.
//
//   m = max_v x[v],  lse = m + log(sum_v exp(x[v] - m))
//   nll = lse - x[target],  argmax = min { v : x[v] = m }
//   kl  = sum_v exp(a[v] - lse_a) * ((a[v] - lse_a) - (b[v] - lse_b))
//
// logits, reference: [rows, vocab]. Exponentials in f32, their sums in f64: with f32 sums over
// 128k entries the error of lse alone would exceed the 1e-7 that identical rows are held to. Equal
// rows give exactly 0, since both logsumexps come out of the same sequence of operations.
//
// Work: 512 threads stride over the vocabulary, coalesced; two passes per row for a logsumexp,
// one more for kl. A row of 128k f32 logits is 512 KB, so the later passes are served by L2. Bound
// by memory. The order of every sum is fixed by the block size.
#include <climits>
#include <cmath>

#include "core/cuda/kernel_common.cuh"
#include "core/cuda/score.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;

struct Best {
  float value;
  int index;
};

// The larger value; of equal ones the lower index.
__device__ __forceinline__ Best Better(Best a, Best b) {
  if (b.value > a.value || (b.value == a.value && b.index < a.index)) return b;
  return a;
}

template <typename T>
__device__ Best BlockArgmax(const T* row, int64_t vocab) {
  __shared__ Best scratch[kWarps];
  Best best = {-INFINITY, INT_MAX};
  for (int64_t v = threadIdx.x; v < vocab; v += kThreads) {
    best = Better(best, {ToFloat(row[v]), static_cast<int>(v)});
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const Best other = {__shfl_xor_sync(kFullMask, best.value, offset),
                        __shfl_xor_sync(kFullMask, best.index, offset)};
    best = Better(best, other);
  }
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = best;
  __syncthreads();
  best = scratch[0];
  for (int i = 1; i < kWarps; ++i) best = Better(best, scratch[i]);
  __syncthreads();
  if (best.index == INT_MAX) best.index = 0;  // a row of NaN
  return best;
}

template <typename T>
__device__ double LogSumExp(const T* row, int64_t vocab, float maximum, double* scratch) {
  double sum = 0;
  for (int64_t v = threadIdx.x; v < vocab; v += kThreads) {
    sum += static_cast<double>(expf(ToFloat(row[v]) - maximum));
  }
  return static_cast<double>(maximum) + log(BlockSum(sum, scratch));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    ScoreRowsKernel(const T* __restrict__ logits, const int32_t* __restrict__ targets,
                    int64_t vocab, float* __restrict__ nll, int32_t* __restrict__ argmax) {
  __shared__ double scratch[kWarps];
  const T* row = logits + blockIdx.x * vocab;
  const Best best = BlockArgmax(row, vocab);
  const double lse = LogSumExp(row, vocab, best.value, scratch);
  if (threadIdx.x == 0) {
    nll[blockIdx.x] = static_cast<float>(lse - ToFloat(row[targets[blockIdx.x]]));
    argmax[blockIdx.x] = best.index;
  }
}

template <typename R, typename L>
__global__ void __launch_bounds__(kThreads)
    KlRowsKernel(const R* __restrict__ reference, const L* __restrict__ logits, int64_t vocab,
                 float* __restrict__ kl) {
  __shared__ double scratch[kWarps];
  const R* a = reference + blockIdx.x * vocab;
  const L* b = logits + blockIdx.x * vocab;
  const double lse_a = LogSumExp(a, vocab, BlockArgmax(a, vocab).value, scratch);
  const double lse_b = LogSumExp(b, vocab, BlockArgmax(b, vocab).value, scratch);
  double sum = 0;
  for (int64_t v = threadIdx.x; v < vocab; v += kThreads) {
    const double log_p = static_cast<double>(ToFloat(a[v])) - lse_a;
    const double log_q = static_cast<double>(ToFloat(b[v])) - lse_b;
    const double p = static_cast<double>(expf(static_cast<float>(log_p)));
    if (p > 0) sum += p * (log_p - log_q);  // 0 log 0 = 0, also for logits of -infinity
  }
  sum = BlockSum(sum, scratch);
  if (threadIdx.x == 0) kl[blockIdx.x] = static_cast<float>(sum);
}

}  // namespace

cudaError_t LaunchScoreRows(const void* logits, DType dtype, const int32_t* targets, int64_t rows,
                            int64_t vocab, float* nll, int32_t* argmax, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    ScoreRowsKernel<T><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
        static_cast<const T*>(logits), targets, vocab, nll, argmax);
    return cudaGetLastError();
  });
}

cudaError_t LaunchKlRows(const void* reference, DType reference_dtype, const void* logits,
                         DType logits_dtype, int64_t rows, int64_t vocab, float* kl,
                         cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return DispatchFloat(reference_dtype, [&](auto r) {
    return DispatchFloat(logits_dtype, [&](auto l) {
      using R = decltype(r);
      using L = decltype(l);
      KlRowsKernel<R, L><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
          static_cast<const R*>(reference), static_cast<const L*>(logits), vocab, kl);
      return cudaGetLastError();
    });
  });
}

}  // namespace quantmill::cuda
