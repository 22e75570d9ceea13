// Kernels of the solver over whole arrays (of solver.cu; CPU reference: solver_cpu.cc): checks, the
// Gram matrix, sums, nearest vectors, decoding and codes.
//   RowDots    a block per row, f64, joined pairwise
//   Nearest    a thread per group; the codebook passes through shared memory in chunks
//   Difference a block per part, f64, joined pairwise
#ifndef QUANTMILL_PLUGINS_AQLM_SOLVER_ARRAYS_CUH_
#define QUANTMILL_PLUGINS_AQLM_SOLVER_ARRAYS_CUH_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "quantmill/sdk/cuda.hpp"
#include "solver.h"

namespace quantmill::aqlm {
namespace {

constexpr int kThreads = 256;

unsigned Blocks(int64_t items) {
  return static_cast<unsigned>(std::max<int64_t>(1, (items + kThreads - 1) / kThreads));
}
__device__ inline int64_t ThreadIndex() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__global__ void FindNotFiniteKernel(Rows x, int64_t rows, int64_t cols, unsigned long long* first) {
  const int64_t i = ThreadIndex();
  if (i < rows * cols && !isfinite(x.data[i / cols * x.stride + i % cols])) {
    atomicMin(first, static_cast<unsigned long long>(i));
  }
}

__global__ void MakeGramKernel(Rows hessian, int64_t n, float damp, float* gram) {
  const int64_t i = ThreadIndex();
  if (i >= n * n) return;
  const int64_t r = i / n, c = i % n;
  const float value =
      hessian.data != nullptr ? hessian.data[r * hessian.stride + c] : (r == c ? 1.0f : 0.0f);
  gram[i] = r == c ? value + damp : value;
}

__global__ void DiagonalKernel(Rows matrix, int64_t n, float* out) {
  const int64_t i = ThreadIndex();
  if (i < n) out[i] = matrix.data[i * matrix.stride + i];
}

__global__ void __launch_bounds__(kThreads)
    RowDotsKernel(Rows a, Rows b, int64_t cols, double* out) {
  const int64_t r = blockIdx.x;
  double sum = 0;
  for (int64_t c = threadIdx.x; c < cols; c += kThreads) {
    sum += static_cast<double>(a.data[r * a.stride + c]) *
           static_cast<double>(b.data[r * b.stride + c]);
  }
  __shared__ double shared[kThreads];
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) out[r] = shared[0];
}

__global__ void NormalizeKernel(Rows x, int64_t row_step, int64_t rows, int64_t cols,
                                const float* scales, float* out) {
  const int64_t i = ThreadIndex();
  if (i >= rows * cols) return;
  const int64_t r = i / cols * row_step;
  out[i] = scales[r] > 0.0f ? x.data[r * x.stride + i % cols] / scales[r] : 0.0f;
}

__global__ void PickKernel(const float* x, const int64_t* at, int64_t count, int d, float* out) {
  const int64_t i = ThreadIndex();
  if (i < count * d) out[i] = x[at[i / d] * d + i % d];
}

// A codebook passes through shared memory in chunks of `chunk` vectors, with half their squared
// norms behind them. kD: group_size, or 0 for any.
template <int kD>
__global__ void __launch_bounds__(kThreads)
    NearestKernel(const float* x, int64_t points, int any_d, const float* codebook, int length,
                  int chunk, int codebooks, int m, uint16_t* indices) {
  extern __shared__ float shared[];
  const int d = kD > 0 ? kD : any_d;
  float* norms = shared + static_cast<int64_t>(chunk) * d;
  const int64_t point = ThreadIndex();
  const bool inside = point < points;
  const float* own = x + (inside ? point : 0) * d;
  float held[kD > 0 ? kD : 1];
  if constexpr (kD > 0) {
#pragma unroll
    for (int a = 0; a < kD; ++a) held[a] = own[a];
  }
  float best = INFINITY;
  int index = 0;
  for (int begin = 0; begin < length; begin += chunk) {
    const int count = min(chunk, length - begin);
    __syncthreads();
    for (int i = threadIdx.x; i < count * d; i += kThreads) {
      shared[i] = codebook[static_cast<int64_t>(begin) * d + i];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < count; c += kThreads) {
      float norm = 0.0f;
      for (int a = 0; a < d; ++a) norm += shared[c * d + a] * shared[c * d + a];
      norms[c] = norm;
    }
    __syncthreads();
    for (int c = 0; c < count; ++c) {
      float inner = 0.0f;
      if constexpr (kD > 0) {
#pragma unroll
        for (int a = 0; a < kD; ++a) inner += held[a] * shared[c * kD + a];
      } else {
        for (int a = 0; a < d; ++a) inner += own[a] * shared[c * d + a];
      }
      const float score = norms[c] - 2.0f * inner;
      if (score < best) {
        best = score;
        index = begin + c;
      }
    }
  }
  if (inside) indices[point * codebooks + m] = static_cast<uint16_t>(index);
}

// One thread per element of x [rows, in].
__global__ void SubtractKernel(int64_t elements, Params p, int m, const float* codebooks,
                               const uint16_t* indices, float* x) {
  const int64_t i = ThreadIndex();
  if (i >= elements) return;
  const int64_t group = i / p.group_size;
  const int64_t vector = static_cast<int64_t>(m) * p.length() + indices[group * p.codebooks + m];
  x[i] -= codebooks[vector * p.group_size + i % p.group_size];
}

__global__ void DecodeKernel(int64_t elements, int64_t cols, Params p, const float* codebooks,
                             const uint16_t* indices, const float* factors, Rows base, float* out) {
  const int64_t i = ThreadIndex();
  if (i >= elements) return;
  const int64_t group = i / p.group_size, r = i / cols;
  float sum = 0.0f;
  for (int m = 0; m < p.codebooks; ++m) {
    const int64_t vector = static_cast<int64_t>(m) * p.length() + indices[group * p.codebooks + m];
    sum += codebooks[vector * p.group_size + i % p.group_size];
  }
  sum *= factors[r];
  out[i] = base.data != nullptr ? base.data[r * base.stride + i % cols] - sum : sum;
}

__global__ void StoreCodesKernel(const uint16_t* indices, int64_t count, int index_bits,
                                 void* codes) {
  const int64_t i = ThreadIndex();
  if (i >= count) return;
  const int32_t code = CodeOfIndex(indices[i], index_bits);
  if (index_bits <= 8) {
    static_cast<int8_t*>(codes)[i] = static_cast<int8_t>(code);
  } else {
    static_cast<int16_t*>(codes)[i] = static_cast<int16_t>(code);
  }
}

__global__ void LoadCodesKernel(const void* codes, int64_t count, int index_bits,
                                uint16_t* indices) {
  const int64_t i = ThreadIndex();
  if (i < count) indices[i] = static_cast<uint16_t>(LoadIndex(codes, index_bits, i));
}

constexpr int kDifferenceBlocks = 128;

// partial [gridDim.x]: sums of squares over the elements of a block's threads, joined pairwise.
__global__ void __launch_bounds__(kThreads)
    DifferenceKernel(const void* a, const void* b, qm_dtype dtype, int64_t count, float factor,
                     float* out, double* partial) {
  double sum = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = ThreadIndex(); i < count; i += step) {
    const float difference = LoadValue(a, dtype, i) - LoadValue(b, dtype, i);
    sum += static_cast<double>(difference) * static_cast<double>(difference);
    out[i] = factor * difference;
  }
  __shared__ double shared[kThreads];
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) partial[blockIdx.x] = shared[0];
}

}  // namespace
}  // namespace quantmill::aqlm

#endif  // QUANTMILL_PLUGINS_AQLM_SOLVER_ARRAYS_CUH_
