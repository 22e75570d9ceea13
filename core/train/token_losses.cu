// Losses of rows of logits and their gradients, in one go and in place:
//
//   q = softmax(s), p = softmax(teacher)
//   lm = -log q[t],  kl = sum_v p[v] (log p[v] - log q[v])
//   s[v] <- scale ((lm_weight + kl_weight) q[v] - kl_weight p[v] - lm_weight (v == t))
//
// (d lm / d s = q - onehot(t), d kl / d s = q - p). Rows with t < 0 get zeros. s: f32 [rows,
// vocab], teacher: [rows, vocab] of any model float, losses: f32 [rows, 2]. CPU reference:
// TokenLossRow of cpu_ops.cc. Exponentials in f32, their sums in f64, as in core/cuda/score.cu.
//
// Work: one block per row; threads stride over the vocabulary; a maximum, a sum and the gradient
// pass per side. A row of 128k f32 logits is 512 KB, so that later passes come from L2. A thread
// overwrites only elements that it alone reads in that pass, the target's among them. Bound by
// memory: rows * vocab * (8 + bytes of teacher).
//
// Versions
//   1  as described (in use)
#include <cmath>

#include "core/cuda/kernel_common.cuh"
#include "core/train/backward_kernels.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;

struct RowSum {
  float largest;
  double sum;
};

// Largest value and sum of exp(value - largest), the same on every thread.
template <typename T>
__device__ RowSum SumOfRow(const T* row, int64_t vocab, float* maxima, double* sums) {
  float largest = -INFINITY;
  for (int64_t v = threadIdx.x; v < vocab; v += kThreads) largest = fmaxf(largest, ToFloat(row[v]));
  largest = WarpMax(largest);
  if (threadIdx.x % kWarpSize == 0) maxima[threadIdx.x / kWarpSize] = largest;
  __syncthreads();
  largest = maxima[0];
  for (int i = 1; i < kWarps; ++i) largest = fmaxf(largest, maxima[i]);
  double sum = 0;
  for (int64_t v = threadIdx.x; v < vocab; v += kThreads) sum += expf(ToFloat(row[v]) - largest);
  return {largest, BlockSum(sum, sums)};  // its barriers also free `maxima`
}

template <typename T>
__global__ void TokenLossKernel1(TokenLossRows rows, const T* teacher) {
  __shared__ float maxima[kWarps];
  __shared__ double sums[kWarps];
  const int64_t vocab = rows.vocab;
  float* s = rows.logits + blockIdx.x * vocab;
  float* losses = rows.losses + blockIdx.x * static_cast<int64_t>(2);
  const int32_t target = rows.targets[blockIdx.x];
  if (target < 0) {
    for (int64_t v = threadIdx.x; v < vocab; v += kThreads) s[v] = 0;
    if (threadIdx.x < 2) losses[threadIdx.x] = 0;
    return;
  }
  const RowSum q = SumOfRow(s, vocab, maxima, sums);
  const double log_q = q.largest + log(q.sum);
  const double lm = log_q - s[target];
  RowSum p = {0, 1};
  double log_p = 0;
  const T* t = nullptr;
  if (teacher != nullptr) {
    t = teacher + blockIdx.x * vocab;
    p = SumOfRow(t, vocab, maxima, sums);
    log_p = p.largest + log(p.sum);
  }
  __syncthreads();  // every thread has read s[target]
  double kl = 0;
  for (int64_t v = threadIdx.x; v < vocab; v += kThreads) {
    const float logit = s[v];
    double gradient = (rows.lm_weight + rows.kl_weight) * (expf(logit - q.largest) / q.sum);
    if (t != nullptr) {
      const float wanted = ToFloat(t[v]);
      const double share = expf(wanted - p.largest) / p.sum;
      kl += share * ((wanted - log_p) - (logit - log_q));
      gradient -= rows.kl_weight * share;
    }
    if (v == target) gradient -= rows.lm_weight;
    s[v] = static_cast<float>(rows.scale * gradient);
  }
  kl = BlockSum(kl, sums);
  if (threadIdx.x == 0) {
    losses[0] = static_cast<float>(lm);
    losses[1] = static_cast<float>(kl);
  }
}

}  // namespace

cudaError_t LaunchTokenLosses(const TokenLossRows& rows, cudaStream_t stream) {
  if (rows.rows == 0 || rows.vocab == 0) return cudaSuccess;
  return DispatchFloat(rows.teacher_dtype, [&](auto t) {
    using T = decltype(t);
    TokenLossKernel1<T><<<static_cast<unsigned>(rows.rows), kThreads, 0, stream>>>(
        rows, static_cast<const T*>(rows.teacher));
    return cudaGetLastError();
  });
}

}  // namespace quantmill::cuda
