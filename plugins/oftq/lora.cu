// Products with a narrow factor, and the small services, on the GPU; the CPU path is lora_cpu.cc.
//
//   c [m, n] (+)= scale a [m, k] b [k, n]
//
// a, b: f32, f16 or bf16, either way round (one stride is 1); c: row-major without gaps. Sums f32.
//
// A CTA computes a tile of 64 by 64, a thread 4 by 4 of it, from 16 of k at a time in shared
// memory. One of m, n, k is the rank, so that the work is small beside the base's product even
// where the rank fills a part of a tile only. A long k with few tiles (x A^T, the gradients) is cut
// into slices, by the shape alone; their sums go to scratch and are added in order: no atomics, the
// same bytes each time. Nothing waits for the device but FindNotFiniteCuda.
#include <algorithm>

#include "oftq_cuda.h"
#include "oftq_math.h"
#include "quantmill/sdk/cuda.hpp"
#include "quantmill/sdk/plugin.hpp"

namespace quantmill::oftq {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64, kDepth = 16;
constexpr int kStride = kTile + 4;  // 16-byte reads
constexpr int64_t kFullGrid = 264;  // tiles that fill a GPU
constexpr int64_t kLeastSlice = 256;

struct Arguments {
  Product p;
  int64_t tiles_across, slice;
  float* partial;  // null: the result goes to c
};

__device__ inline float LoadFloat(const void* data, qm_dtype dtype, int64_t at) {
  if (dtype == QM_F16) return qm::ToFloat(static_cast<const qm::F16*>(data)[at]);
  if (dtype == QM_BF16) return qm::ToFloat(static_cast<const qm::BF16*>(data)[at]);
  return static_cast<const float*>(data)[at];
}

// c[at] (+)= scale sum
__device__ inline void StoreFloat(const Product& p, int64_t at, float sum) {
  float value = p.scale * sum;
  if (p.accumulate) value += static_cast<const float*>(p.c)[at];
  if (p.c_dtype == QM_F16) {
    static_cast<qm::F16*>(p.c)[at] = qm::ToF16(value);
  } else if (p.c_dtype == QM_BF16) {
    static_cast<qm::BF16*>(p.c)[at] = qm::ToBF16(value);
  } else {
    static_cast<float*>(p.c)[at] = value;
  }
}

// tile[d][i] = operand at wide index `first` + i (below `extent`) and depth index `depth` + d
// (below `end`), else 0. Neighbouring threads go along the axis whose stride is 1.
__device__ void LoadTile(const void* data, qm_dtype dtype, int64_t wide_stride,
                         int64_t depth_stride, int64_t first, int64_t extent, int64_t depth,
                         int64_t end, float (*tile)[kStride]) {
  const bool along_depth = depth_stride == 1;
  for (int at = threadIdx.x; at < kTile * kDepth; at += kThreads) {
    const int i = along_depth ? at / kDepth : at % kTile;
    const int d = along_depth ? at % kDepth : at / kTile;
    const bool inside = first + i < extent && depth + d < end;
    tile[d][i] =
        inside ? LoadFloat(data, dtype, (first + i) * wide_stride + (depth + d) * depth_stride)
               : 0.0f;
  }
}

__global__ void __launch_bounds__(kThreads) lora_product_kernel1(Arguments arguments) {
  __shared__ __align__(16) float a_tile[kDepth][kStride];
  __shared__ __align__(16) float b_tile[kDepth][kStride];
  const Product& p = arguments.p;
  const int64_t row = blockIdx.x / arguments.tiles_across * kTile;
  const int64_t column = blockIdx.x % arguments.tiles_across * kTile;
  const int64_t begin = blockIdx.y * arguments.slice;
  const int64_t end = min(p.k, begin + arguments.slice);
  const int i0 = static_cast<int>(threadIdx.x) / 16 * 4,
            j0 = static_cast<int>(threadIdx.x) % 16 * 4;
  float sum[4][4] = {};
  for (int64_t k = begin; k < end; k += kDepth) {
    LoadTile(p.a.data, p.a.dtype, p.a.row_stride, p.a.column_stride, row, p.m, k, end, a_tile);
    LoadTile(p.b.data, p.b.dtype, p.b.column_stride, p.b.row_stride, column, p.n, k, end, b_tile);
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const float4 a = *reinterpret_cast<const float4*>(&a_tile[d][i0]);
      const float4 b = *reinterpret_cast<const float4*>(&b_tile[d][j0]);
      const float left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += left[i] * right[j];
      }
    }
    __syncthreads();
  }
  // partial [slices, m, n]
  const int64_t offset = blockIdx.y * p.m * p.n;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (row + i0 + i >= p.m || column + j0 + j >= p.n) continue;
      const int64_t at = (row + i0 + i) * p.n + column + j0 + j;
      if (arguments.partial != nullptr) {
        arguments.partial[offset + at] = sum[i][j];
      } else {
        StoreFloat(p, at, sum[i][j]);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    lora_join_kernel1(Product p, const float* partial, int slices) {
  const int64_t count = p.m * p.n;
  const int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (at >= count) return;
  float sum = 0.0f;
  for (int s = 0; s < slices; ++s) sum += partial[s * count + at];
  StoreFloat(p, at, sum);
}

__global__ void __launch_bounds__(kThreads)
    lora_uniform_kernel1(uint64_t seed, float bound, float* values, int64_t count) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i < count) values[i] = bound * UniformAt(seed, static_cast<uint64_t>(i));
}

constexpr unsigned long long kNone = ~0ull;

__global__ void __launch_bounds__(kThreads)
    oftq_not_finite_kernel1(const float* values, int64_t count, unsigned long long* first) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i < count && !isfinite(values[i])) atomicMin(first, static_cast<unsigned long long>(i));
}

unsigned GridOf(int64_t count) { return static_cast<unsigned>((count + kThreads - 1) / kThreads); }

}  // namespace

// tiles * slices <= 2 kFullGrid wherever there is more than one slice.
int64_t ProductScratchCuda() { return 2 * kFullGrid * kTile * kTile; }

qm_status MultiplyCuda(qm_call* call, const Product& p, float* scratch) {
  const int64_t across = (p.n + kTile - 1) / kTile, tiles = (p.m + kTile - 1) / kTile * across;
  const int64_t wanted =
      std::clamp<int64_t>(kFullGrid / tiles, 1, (p.k + kLeastSlice - 1) / kLeastSlice);
  const int64_t slice = ((p.k + wanted - 1) / wanted + kDepth - 1) / kDepth * kDepth;
  const int64_t slices = std::max<int64_t>((p.k + slice - 1) / slice, 1);
  const Arguments arguments = {p, across, slice, slices > 1 ? scratch : nullptr};
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(slices));
  lora_product_kernel1<<<grid, kThreads, 0, qm::Stream(call)>>>(arguments);
  QM_CUDA(call, cudaGetLastError());
  if (slices == 1) return QM_OK;
  lora_join_kernel1<<<GridOf(p.m * p.n), kThreads, 0, qm::Stream(call)>>>(p, scratch,
                                                                          static_cast<int>(slices));
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

qm_status FillUniformCuda(qm_call* call, uint64_t seed, float bound, float* values, int64_t count) {
  lora_uniform_kernel1<<<GridOf(count), kThreads, 0, qm::Stream(call)>>>(seed, bound, values,
                                                                         count);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

qm_status FillZeroCuda(qm_call* call, float* values, int64_t count) {
  QM_CUDA(call,
          cudaMemsetAsync(values, 0, static_cast<size_t>(count) * sizeof(float), qm::Stream(call)));
  return QM_OK;
}

qm_status FindNotFiniteCuda(qm_call* call, const float* values, int64_t count, int64_t* index) {
  const cudaStream_t stream = qm::Stream(call);
  unsigned long long* first = nullptr;
  QM_TRY(qm::Scratch(call, call->device, 1, "the finiteness check", &first));
  QM_CUDA(call, cudaMemsetAsync(first, 0xFF, sizeof *first, stream));  // kNone
  oftq_not_finite_kernel1<<<GridOf(count), kThreads, 0, stream>>>(values, count, first);
  QM_CUDA(call, cudaGetLastError());
  unsigned long long found = kNone;
  QM_CUDA(call, cudaMemcpyAsync(&found, first, sizeof found, cudaMemcpyDeviceToHost, stream));
  QM_CUDA(call, cudaStreamSynchronize(stream));
  *index = found == kNone ? -1 : static_cast<int64_t>(found);
  return QM_OK;
}

qm_status CopyCuda(qm_call* call, const float* from, float* to, int64_t count) {
  QM_CUDA(call, cudaMemcpyAsync(to, from, static_cast<size_t>(count) * sizeof(float),
                                cudaMemcpyDeviceToDevice, qm::Stream(call)));
  return QM_OK;
}

}  // namespace quantmill::oftq
