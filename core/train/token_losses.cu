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
// Work: one block per row; threads stride over the vocabulary, four elements at a time where
// alignment allows. The first pass finds the largest value and the sum of exponentials of both
// sides at once (each thread rescales its sum when its largest value grows), the second writes the
// gradient. A row of 128k f32 logits is 512 KB, so that the second pass comes from L2. A thread
// overwrites only elements that it alone reads in that pass, the target's among them. Bound by
// memory: rows * vocab * (8 + bytes of teacher).
//
// Versions
//   1  a pass for the maximum, a pass for the sum, quotients in f64
//   2  both in one pass, products with the inverse sum in f32 (in use)
#include <cmath>

#include "core/cuda/kernel_common.cuh"
#include "core/train/backward_kernels.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// Of a row, or of a thread's part of it: the largest value and the sum of exp(value - largest).
struct RowSum {
  float largest = -INFINITY;
  double sum = 0;
};

template <typename T, int N>
__device__ __forceinline__ void Load(const T* row, int64_t i, float (&out)[N]) {
  const Vec<T, N> in = *reinterpret_cast<const Vec<T, N>*>(row + i);
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = ToFloat(in.v[j]);
}

template <int N>
__device__ __forceinline__ void Include(const float (&values)[N], RowSum& part) {
  float largest = part.largest;
#pragma unroll
  for (int j = 0; j < N; ++j) largest = fmaxf(largest, values[j]);
  // Nothing but -infinity so far: any finite reference keeps its exponential 0.
  const float reference = largest == -INFINITY ? 0.0f : largest;
  if (largest > part.largest) part.sum *= expf(part.largest - reference);
  part.largest = largest;
#pragma unroll
  for (int j = 0; j < N; ++j) part.sum += expf(values[j] - reference);
}

// The row's, the same on every thread. Ends with a barrier.
__device__ __forceinline__ RowSum Total(const RowSum& part, float* maxima, double* sums) {
  float largest = WarpMax(part.largest);
  if (threadIdx.x % kWarpSize == 0) maxima[threadIdx.x / kWarpSize] = largest;
  __syncthreads();
  largest = maxima[0];
  for (int i = 1; i < kWarps; ++i) largest = fmaxf(largest, maxima[i]);
  // The barriers of BlockSum also free `maxima`.
  return {largest, BlockSum(part.sum * expf(part.largest - largest), sums)};
}

// N elements per access, 1 or 4.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) TokenLossKernel2(TokenLossRows rows, const T* teacher) {
  __shared__ float maxima[kWarps];
  __shared__ double sums[kWarps];
  const int64_t vocab = rows.vocab;
  float* s = rows.logits + blockIdx.x * vocab;
  const T* t = teacher == nullptr ? nullptr : teacher + blockIdx.x * vocab;
  float* losses = rows.losses + blockIdx.x * static_cast<int64_t>(2);
  const int32_t target = rows.targets[blockIdx.x];
  if (target < 0) {
    for (int64_t v = threadIdx.x; v < vocab; v += kThreads) s[v] = 0;
    if (threadIdx.x < 2) losses[threadIdx.x] = 0;
    return;
  }
  RowSum q_part, p_part;
#pragma unroll 2
  for (int64_t v = static_cast<int64_t>(threadIdx.x) * N; v < vocab; v += kThreads * N) {
    float logits[N], wanted[N];
    Load<float, N>(s, v, logits);
    if (t != nullptr) Load<T, N>(t, v, wanted);
    Include(logits, q_part);
    if (t != nullptr) Include(wanted, p_part);
  }
  const RowSum q = Total(q_part, maxima, sums);
  const double log_q = q.largest + log(q.sum);
  const double lm = log_q - s[target];
  RowSum p;
  if (t != nullptr) p = Total(p_part, maxima, sums);
  const double change = t == nullptr ? 0 : log_q - (p.largest + log(p.sum));
  const auto q_scale = static_cast<float>(1 / q.sum);
  const auto p_scale = t == nullptr ? 0.0f : static_cast<float>(1 / p.sum);
  __syncthreads();  // every thread has read s[target]
  double kl = 0;
  const float q_weight = rows.lm_weight + rows.kl_weight;
#pragma unroll 2
  for (int64_t v = static_cast<int64_t>(threadIdx.x) * N; v < vocab; v += kThreads * N) {
    float logits[N], wanted[N];
    Load<float, N>(s, v, logits);
    if (t != nullptr) Load<T, N>(t, v, wanted);
    Vec<float, N> gradient;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float value = q_weight * (expf(logits[j] - q.largest) * q_scale);
      if (t != nullptr) {
        const float share = expf(wanted[j] - p.largest) * p_scale;
        // log p - log q; the difference in f64, since the terms cancel in the sum.
        kl += share * (static_cast<double>(wanted[j]) - logits[j] + change);
        value -= rows.kl_weight * share;
      }
      if (v + j == target) value -= rows.lm_weight;
      gradient.v[j] = rows.scale * value;
    }
    *reinterpret_cast<Vec<float, N>*>(s + v) = gradient;
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
    const auto* teacher = static_cast<const T*>(rows.teacher);
    const auto blocks = static_cast<unsigned>(rows.rows);
    if (rows.vocab % 4 == 0 && Aligned(rows.logits, 16) && Aligned(teacher, sizeof(Vec<T, 4>))) {
      TokenLossKernel2<T, 4><<<blocks, kThreads, 0, stream>>>(rows, teacher);
    } else {
      TokenLossKernel2<T, 1><<<blocks, kThreads, 0, stream>>>(rows, teacher);
    }
    return cudaGetLastError();
  });
}

}  // namespace quantmill::cuda
