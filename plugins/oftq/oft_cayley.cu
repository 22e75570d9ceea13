// From stored numbers to rotations on the GPU, and the derivative; the CPU path is oft_cpu.cc.
//
//   R_k = p(Q_k)                     [b, b] per block of b channels, Q_k skew from stored numbers
//   d_q = the triangle of dL/dQ - (dL/dQ)^T, dL/dQ from G_k = dL/dR_k
//
// R, G: [in / b, b, b] f32; b from 2 to 128; sums in f32.
//
// 1. oft_series_kernel2: a warp per row of R; oft_exact_kernel1: a CTA per block builds R in shared
//    memory.
// 2. oft_join_kernel1 adds partial G in their order: no atomics, the same bytes each time.
// 3. oft_series_gradient_kernel2 (a warp per column of dL/dQ) with oft_triangle_kernel1, or
//    oft_exact_gradient_kernel2 (a CTA per block): from G to d_q.
//
// Assumed: contiguous tensors (checked in plugin.cc); at b = 128 129 KiB of shared memory, and 194
// for the exact gradient (sm_90; sm_80 up to b = 117). Nothing waits for the device.
#include "oft_common.cuh"
#include "oftq_cuda.h"
#include "oftq_math.h"

namespace quantmill::oftq {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// An odd row length: rows and columns of the matrix are both read without bank conflicts.
__host__ __device__ inline int OddStride(int b) { return b | 1; }

// ---- building R --------------------------------------------------------------------------------

// Q of one block into shared memory, row stride `stride`: a warp per row of the triangle. Ends with
// a barrier.
__device__ void LoadSkew(const float* q, int b, int stride, float* out) {
  for (int i = threadIdx.x / 32; i < b; i += kWarps) {
    for (int j = i + threadIdx.x % 32; j < b; j += 32) {
      const float value = i < j ? q[TriangleIndex(i, j, b)] : 0.0f;
      out[i * stride + j] = value;
      if (i < j) out[j * stride + i] = -value;
    }
  }
  __syncthreads();
}

// A column of a polynomial in U = Q^T and, if kGradient, of the upper right part of the polynomial
// of [[U, G], [0, U]] (oft_cpu.cc, SeriesGradient), by Horner's rule. A warp holds the column in
// registers: element 32 h + lane of it in entry h. U[i, k] = Q[k, i] is read along a row of Q.
template <int kParts, bool kGradient>
__device__ void SeriesColumn(const float* q, const float* g, int b, int stride, int degree,
                             int column, float (&sum)[kParts], float (&right)[kParts]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < kParts; ++h) {
    sum[h] = h * 32 + lane == column ? Coefficient(degree, degree) : 0.0f;
    right[h] = 0.0f;
  }
  for (int power = degree - 1; power >= 0; --power) {
    float next[kParts], next_right[kParts];
#pragma unroll
    for (int h = 0; h < kParts; ++h) {
      next[h] = h * 32 + lane == column ? Coefficient(power, degree) : 0.0f;
      next_right[h] = 0.0f;
    }
#pragma unroll
    for (int from = 0; from < kParts; ++from) {
      const int count = min(32, b - from * 32);
      for (int l = 0; l < count; ++l) {
        const int k = from * 32 + l;
        const float s = __shfl_sync(kAllLanes, sum[from], l);
        const float e = kGradient ? __shfl_sync(kAllLanes, right[from], l) : 0.0f;
#pragma unroll
        for (int h = 0; h < kParts; ++h) {
          const int i = h * 32 + lane;
          if (i >= b) continue;
          const float u = q[k * stride + i];
          next[h] += u * s;
          if (kGradient) next_right[h] += u * e + g[i * stride + k] * s;
        }
      }
    }
#pragma unroll
    for (int h = 0; h < kParts; ++h) {
      sum[h] = next[h];
      right[h] = next_right[h];
    }
  }
}

// Column j of p(Q^T) is row j of p(Q). Of blockIdx.x's block, rows blockIdx.y kWarps and on.
template <int kParts>
__global__ void __launch_bounds__(kThreads)
    oft_series_kernel2(const float* q, int b, int degree, float* r) {
  extern __shared__ float shared[];
  const int stride = OddStride(b), lane = threadIdx.x % 32;
  const int row = blockIdx.y * kWarps + threadIdx.x / 32;
  LoadSkew(q + blockIdx.x * (static_cast<int64_t>(b) * (b - 1) / 2), b, stride, shared);
  if (row >= b) return;
  float sum[kParts], unused[kParts];
  SeriesColumn<kParts, false>(shared, nullptr, b, stride, degree, row, sum, unused);
  float* out = r + (blockIdx.x * static_cast<int64_t>(b) + row) * b;
#pragma unroll
  for (int h = 0; h < kParts; ++h) {
    if (h * 32 + lane < b) out[h * 32 + lane] = sum[h];
  }
}

// R = 2 (I + Q)^-1 - I, by Gauss-Jordan in place. No pivoting: see oft_cpu.cc, Invert.
__global__ void __launch_bounds__(kThreads) oft_exact_kernel1(const float* q, int b, float* r) {
  extern __shared__ float shared[];
  const int stride = OddStride(b);
  float* row = shared + b * stride;  // of the pivot, divided by it
  float* column = row + b;           // of the pivot
  LoadSkew(q + blockIdx.x * (static_cast<int64_t>(b) * (b - 1) / 2), b, stride, shared);
  for (int i = threadIdx.x; i < b; i += blockDim.x) shared[i * stride + i] = 1.0f;
  __syncthreads();
  for (int p = 0; p < b; ++p) {
    const float inverse = 1.0f / shared[p * stride + p];
    for (int i = threadIdx.x; i < b; i += blockDim.x) {
      row[i] = i == p ? inverse : shared[p * stride + i] * inverse;
      column[i] = shared[i * stride + p];
    }
    __syncthreads();
    for (int at = threadIdx.x; at < b * b; at += blockDim.x) {
      const int i = at / b, j = at % b;
      float& value = shared[i * stride + j];
      if (i == p) {
        value = row[j];
      } else {
        value = (j == p ? 0.0f : value) - column[i] * row[j];
      }
    }
    __syncthreads();
  }
  float* out = r + blockIdx.x * static_cast<int64_t>(b) * b;
  for (int at = threadIdx.x; at < b * b; at += blockDim.x) {
    const int i = at / b, j = at % b;
    out[at] = 2.0f * shared[i * stride + j] - (i == j ? 1.0f : 0.0f);
  }
}

// ---- from G to d_q -----------------------------------------------------------------------------

// g [numbers] = the slices of `partial` [slices, numbers], added in their order.
__global__ void __launch_bounds__(kThreads)
    oft_join_kernel1(const float* partial, int slices, int64_t numbers, float* g) {
  const int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (at >= numbers) return;
  float sum = 0.0f;
  for (int s = 0; s < slices; ++s) sum += partial[s * numbers + at];
  g[at] = sum;
}

// Of one block, from [blocks, b, b] into shared memory, a warp per row. Ends with a barrier.
__device__ void LoadBlock(const float* from, int b, int stride, float* out) {
  from += blockIdx.x * static_cast<int64_t>(b) * b;
  for (int i = threadIdx.x / 32; i < b; i += kWarps) {
    for (int j = threadIdx.x % 32; j < b; j += 32) out[i * stride + j] = from[i * b + j];
  }
  __syncthreads();
}

// d_transposed [blocks, b, b]: (dL/dQ)^T; rows blockIdx.y kWarps and on of blockIdx.x's block.
template <int kParts>
__global__ void __launch_bounds__(kThreads)
    oft_series_gradient_kernel2(const float* q, const float* g, int b, int degree,
                                float* d_transposed) {
  extern __shared__ float shared[];
  const int stride = OddStride(b), lane = threadIdx.x % 32;
  const int column = blockIdx.y * kWarps + threadIdx.x / 32;
  float* g_block = shared + b * stride;
  LoadSkew(q + blockIdx.x * (static_cast<int64_t>(b) * (b - 1) / 2), b, stride, shared);
  LoadBlock(g, b, stride, g_block);
  if (column >= b) return;
  float sum[kParts], right[kParts];
  SeriesColumn<kParts, true>(shared, g_block, b, stride, degree, column, sum, right);
  float* out = d_transposed + (blockIdx.x * static_cast<int64_t>(b) + column) * b;
#pragma unroll
  for (int h = 0; h < kParts; ++h) {
    if (h * 32 + lane < b) out[h * 32 + lane] = right[h];
  }
}

// d_q += the triangle of dL/dQ - (dL/dQ)^T, a CTA per block.
__global__ void __launch_bounds__(kThreads)
    oft_triangle_kernel1(const float* d_transposed, int b, float* d_q) {
  const float* d = d_transposed + blockIdx.x * static_cast<int64_t>(b) * b;
  float* out = d_q + blockIdx.x * (static_cast<int64_t>(b) * (b - 1) / 2);
  for (int at = threadIdx.x; at < b * b; at += blockDim.x) {
    const int i = at / b, j = at % b;
    if (i < j) out[TriangleIndex(i, j, b)] += d[j * b + i] - d[i * b + j];
  }
}

// dL/dQ = -1/2 (R + I)^T G (R + I)^T
__global__ void __launch_bounds__(kThreads)
    oft_exact_gradient_kernel2(const float* r, const float* g_blocks, int b, float* d_q) {
  extern __shared__ float shared[];
  const int stride = OddStride(b);
  float* g = shared + b * stride;
  float* right = g + b * stride;
  const float* from = r + blockIdx.x * static_cast<int64_t>(b) * b;
  for (int at = threadIdx.x; at < b * b; at += blockDim.x) {
    shared[at / b * stride + at % b] = from[at] + (at / b == at % b ? 1.0f : 0.0f);
  }
  LoadBlock(g_blocks, b, stride, g);
  for (int at = threadIdx.x; at < b * b; at += blockDim.x) {
    const int i = at / b, j = at % b;
    float sum = 0.0f;
    for (int k = 0; k < b; ++k) sum += g[i * stride + k] * shared[j * stride + k];
    right[i * stride + j] = sum;
  }
  __syncthreads();
  for (int at = threadIdx.x; at < b * b; at += blockDim.x) {
    const int i = at / b, j = at % b;
    float sum = 0.0f;
    for (int k = 0; k < b; ++k) sum += shared[k * stride + i] * right[k * stride + j];
    g[i * stride + j] = -0.5f * sum;
  }
  __syncthreads();
  float* out = d_q + blockIdx.x * (static_cast<int64_t>(b) * (b - 1) / 2);
  for (int at = threadIdx.x; at < b * b; at += blockDim.x) {
    const int i = at / b, j = at % b;
    if (i < j) out[TriangleIndex(i, j, b)] += g[i * stride + j] - g[j * stride + i];
  }
}

// ---- launches ----------------------------------------------------------------------------------

// A warp per row or column of each block.
dim3 WarpGrid(const Rotation& rotation) {
  return dim3(static_cast<unsigned>(rotation.blocks()),
              static_cast<unsigned>((rotation.block + kWarps - 1) / kWarps));
}

template <int kParts>
qm_status LaunchSeries(qm_call* call, const Rotation& rotation, const float* q, float* r) {
  const int b = static_cast<int>(rotation.block);
  const size_t bytes = sizeof(float) * b * OddStride(b);
  QM_TRY(AllowShared(call, oft_series_kernel2<kParts>, bytes));
  oft_series_kernel2<kParts><<<WarpGrid(rotation), kThreads, bytes, qm::Stream(call)>>>(
      q, b, Degree(static_cast<int>(rotation.terms)), r);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

template <int kParts>
qm_status LaunchSeriesGradient(qm_call* call, const Rotation& rotation, const float* q,
                               const float* g, float* d_transposed) {
  const int b = static_cast<int>(rotation.block);
  const size_t bytes = sizeof(float) * 2 * b * OddStride(b);
  QM_TRY(AllowShared(call, oft_series_gradient_kernel2<kParts>, bytes));
  oft_series_gradient_kernel2<kParts><<<WarpGrid(rotation), kThreads, bytes, qm::Stream(call)>>>(
      q, g, b, Degree(static_cast<int>(rotation.terms)), d_transposed);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

}  // namespace

qm_status BuildRotationCuda(qm_call* call, const Rotation& rotation, const float* q, float* r) {
  const int b = static_cast<int>(rotation.block);
  if (rotation.terms != 0) {
    if (b <= 32) return LaunchSeries<1>(call, rotation, q, r);
    if (b <= 64) return LaunchSeries<2>(call, rotation, q, r);
    return LaunchSeries<4>(call, rotation, q, r);
  }
  const size_t bytes = sizeof(float) * (b * OddStride(b) + 2 * b);
  QM_TRY(AllowShared(call, oft_exact_kernel1, bytes));
  oft_exact_kernel1<<<static_cast<unsigned>(rotation.blocks()), kThreads, bytes,
                      qm::Stream(call)>>>(q, b, r);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

qm_status SkewGradientCuda(qm_call* call, const Rotation& rotation, const float* q, const float* r,
                           const float* partial, int slices, float* scratch, float* d_q) {
  const int64_t numbers = rotation.elements();
  float* g = scratch;
  float* d_transposed = scratch + numbers;
  oft_join_kernel1<<<static_cast<unsigned>((numbers + kThreads - 1) / kThreads), kThreads, 0,
                     qm::Stream(call)>>>(partial, slices, numbers, g);
  QM_CUDA(call, cudaGetLastError());
  const int b = static_cast<int>(rotation.block);
  const unsigned blocks = static_cast<unsigned>(rotation.blocks());
  if (rotation.terms == 0) {
    const size_t bytes = sizeof(float) * 3 * b * OddStride(b);
    QM_TRY(AllowShared(call, oft_exact_gradient_kernel2, bytes));
    oft_exact_gradient_kernel2<<<blocks, kThreads, bytes, qm::Stream(call)>>>(r, g, b, d_q);
    QM_CUDA(call, cudaGetLastError());
    return QM_OK;
  }
  if (b <= 32) {
    QM_TRY(LaunchSeriesGradient<1>(call, rotation, q, g, d_transposed));
  } else if (b <= 64) {
    QM_TRY(LaunchSeriesGradient<2>(call, rotation, q, g, d_transposed));
  } else {
    QM_TRY(LaunchSeriesGradient<4>(call, rotation, q, g, d_transposed));
  }
  oft_triangle_kernel1<<<blocks, kThreads, 0, qm::Stream(call)>>>(d_transposed, b, d_q);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

}  // namespace quantmill::oftq
