// Sums of x over the codes that rows use, in fixed point (of solver.cu; CPU reference:
// solver_cpu.cc): |factor x| < 2^e over all elements, terms are rounded to multiples of 2^(e - s),
// s such that the sum of all fits 62 bits; integers may be added in any order (shared memory where
// the sums fit, then global).
#ifndef QUANTMILL_PLUGINS_AQLM_SOLVER_SCATTER_CUH_
#define QUANTMILL_PLUGINS_AQLM_SOLVER_SCATTER_CUH_

#include <cmath>
#include <cstdint>

#include "solver_arrays.cuh"

namespace quantmill::aqlm {
namespace {

__device__ inline float Power(float factor, int power) {
  return power == 0 ? 1.0f : power == 1 ? factor : factor * factor;
}

// Bits of the largest |factor^power x|: order of magnitudes is that of their bits. NaN is largest.
__global__ void __launch_bounds__(kThreads)
    LargestKernel(Rows x, int64_t elements, int64_t cols, const float* factors, int power,
                  unsigned* largest) {
  unsigned own = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = ThreadIndex(); i < elements; i += step) {
    const int64_t r = i / cols;
    const float value = x.data[r * x.stride + i % cols] * Power(factors[r], power);
    own = max(own, __float_as_uint(fabsf(value)));
  }
  own = __reduce_max_sync(0xFFFFFFFFu, own);
  if (threadIdx.x % 32 == 0) atomicMax(largest, own);
}

struct ScatterTask {
  Rows x;
  int64_t elements, cols;
  const float* factors;
  int power, first, last;
  Params params;
  const uint16_t* indices;
  const unsigned* largest;   // device: see LargestKernel
  int count_bits;            // 2^count_bits is at least the number of terms
  unsigned long long* sums;  // [last - first, 2^B, d], zeroed; two's complement
};

// 2^shift turns a term into an integer; the sum of all terms stays below 2^62.
__host__ __device__ inline int ScatterShift(float largest, int count_bits) {
  int exponent = 0;
  frexpf(largest, &exponent);  // largest < 2^exponent
  return 62 - exponent - count_bits;
}

template <bool kShared>
__global__ void __launch_bounds__(kThreads) ScatterKernel(ScatterTask task) {
  extern __shared__ unsigned long long own[];
  const Params& p = task.params;
  const int d = p.group_size;
  const int64_t per_codebook = static_cast<int64_t>(p.length()) * d;
  const int64_t values = (task.last - task.first) * per_codebook;
  const float largest = __uint_as_float(*task.largest);
  if (!(largest > 0.0f) || !isfinite(largest)) return;  // uniform; sums stay 0
  const int shift = ScatterShift(largest, task.count_bits);
  if constexpr (kShared) {
    for (int64_t v = threadIdx.x; v < values; v += kThreads) own[v] = 0;
    __syncthreads();
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = ThreadIndex(); i < task.elements; i += step) {
    const int64_t r = i / task.cols, group = i / d;
    const float value =
        task.x.data[r * task.x.stride + i % task.cols] * Power(task.factors[r], task.power);
    const unsigned long long term =
        static_cast<unsigned long long>(__double2ll_rn(scalbn(static_cast<double>(value), shift)));
    for (int m = task.first; m < task.last; ++m) {
      const int64_t to = (m - task.first) * per_codebook +
                         static_cast<int64_t>(task.indices[group * p.codebooks + m]) * d + i % d;
      atomicAdd(kShared ? own + to : task.sums + to, term);
    }
  }
  if constexpr (kShared) {
    __syncthreads();
    for (int64_t v = threadIdx.x; v < values; v += kThreads) {
      if (own[v] != 0) atomicAdd(task.sums + v, own[v]);
    }
  }
}

}  // namespace
}  // namespace quantmill::aqlm

#endif  // QUANTMILL_PLUGINS_AQLM_SOLVER_SCATTER_CUH_
