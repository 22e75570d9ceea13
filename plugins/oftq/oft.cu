// Block-diagonal rotations of rows on the GPU; the CPU path is oft_cpu.cc, the rotations themselves
// are made in oft_cayley.cu.
//
//   out[row, k b + c] = sum_j x[row, k b + j] R_k[j, c]
//   d_x = d_out R^T,  G_k = x_k^T d_out_k
//
// x, out: [rows, in] f32, f16 or bf16; R, G: [in / b, b, b] f32; b from 2 to 128; sums in f32.
//
// 1. Blocks of 48 and more, divisible by 4: both products as batches of lora.cu, on tensor cores.
// 2. oft_rotate_kernel2: a CTA takes 128 rows of one block (of several where b < 32); a thread 8
//    rows by 4 columns, so that 32 fused multiply-adds need three 16-byte reads of shared memory.
//    Where b and the width are multiples of 4, memory is read and written four values at a time.
// 3. oft_gradient_kernel2: partial G over a slice of the rows, a thread 4 by 4 of it. The slices
//    depend on the shape alone, and are added in their order: no atomics, the same bytes each time.
//
// Assumed: contiguous tensors (checked in plugin.cc); at b = 127 131 KiB of shared memory. Nothing
// waits for the device.
//
// Measured in a training of a model of 19 M parameters, bf16, 32 x 1024 tokens a step, a rotation
// of 4 terms on each of 70 linears (H200, 2026-11-30): b = 128 350,000 tokens/s; with 2 and 3 alone
// 281,000.
#include <algorithm>

#include "oft_common.cuh"
#include "oftq_cuda.h"
#include "oftq_math.h"

namespace quantmill::oftq {
namespace {

template <class T>
__device__ inline float Widen(T value) {
  return qm::ToFloat(value);
}
template <>
__device__ inline float Widen<float>(float value) {
  return value;
}

template <class T>
__device__ inline T Narrow(float value);
template <>
__device__ inline float Narrow<float>(float value) {
  return value;
}
template <>
__device__ inline qm::F16 Narrow<qm::F16>(float value) {
  return qm::ToF16(value);
}
template <>
__device__ inline qm::BF16 Narrow<qm::BF16>(float value) {
  return qm::ToBF16(value);
}

// ---- rotating ----------------------------------------------------------------------------------

constexpr int kTileRows = 128;
constexpr int kRowsPerThread = 8, kColumnsPerThread = 4;
constexpr int kTileStride = kTileRows + 4;  // of x transposed: 16-byte reads along rows

__host__ __device__ inline int PaddedBlock(int b) { return (b + 3) / 4 * 4; }

struct RotateArguments {
  const float* r;
  const void* in;
  void* out;
  int64_t rows, width;
  int b, blocks, blocks_per_cta;
};

// Of a row in r_tile: four floats are read at once, and rows that are written as columns spread
// over eight banks.
__host__ __device__ inline int RotationStride(int b) { return PaddedBlock(b) + 4; }

// r_tile [blocks, b, RotationStride]: R or R^T of each block, zeros behind it. A warp reads a row.
template <bool kTransposed>
__device__ void LoadRotations(const RotateArguments& a, int first, int blocks, float* r_tile) {
  const int b = a.b, padded = PaddedBlock(b), stride = RotationStride(b);
  const int lines = kTransposed ? padded : b, across = kTransposed ? b : padded;
  for (int line = threadIdx.x / 32; line < blocks * lines; line += kWarps) {
    const int block = line / lines, i = line % lines;
    const float* from = a.r + ((first + block) * static_cast<int64_t>(b) + i) * b;
    float* to = r_tile + block * b * stride;
#pragma unroll 4
    for (int j = threadIdx.x % 32; j < across; j += 32) {
      to[kTransposed ? j * stride + i : i * stride + j] = i < b && j < b ? from[j] : 0.0f;
    }
  }
}

// x_tile [columns, kTileStride]: rows behind the last are zero. A warp reads 4 rows by 8 columns,
// which its writes spread over all banks.
template <class T>
__device__ void LoadTile(const RotateArguments& a, int64_t row, int64_t column, int columns,
                         float* x_tile) {
  const T* in = static_cast<const T*>(a.in);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int across = (columns + 7) / 8;
  for (int piece = warp; piece < across * (kTileRows / 4); piece += kWarps) {
    const int c = piece % across * 8 + lane % 8, r = piece / across * 4 + lane / 8;
    if (c >= columns) continue;
    x_tile[c * kTileStride + r] =
        row + r < a.rows ? Widen(in[(row + r) * a.width + column + c]) : 0.0f;
  }
}

// Four neighbours in memory, aligned to their size.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T values[4];
};

// The same with four columns at a time: a warp takes 16 rows by 8 columns.
template <class T>
__device__ void LoadTileByFours(const RotateArguments& a, int64_t row, int64_t column, int columns,
                                float* x_tile) {
  static_assert(kTileRows == kWarps * 16);
  const int lane = threadIdx.x % 32, r = threadIdx.x / 32 * 16 + lane % 16;
  const bool inside = row + r < a.rows;
  const T* in = static_cast<const T*>(a.in) + (row + r) * a.width + column;
#pragma unroll 4
  for (int c = lane / 16 * 4; c < columns; c += 8) {
    Four<T> four = {};
    if (inside) four = *reinterpret_cast<const Four<T>*>(in + c);
#pragma unroll
    for (int i = 0; i < 4; ++i) x_tile[(c + i) * kTileStride + r] = Widen(four.values[i]);
  }
}

template <class T, bool kAccumulate>
__device__ void StoreRow(const float* sum, int count, T* out) {
#pragma unroll
  for (int c = 0; c < kColumnsPerThread; ++c) {
    if (c >= count) break;
    out[c] = Narrow<T>(kAccumulate ? Widen(out[c]) + sum[c] : sum[c]);
  }
}

template <class T, bool kAccumulate>
__device__ void StoreFour(const float* sum, T* out) {
  Four<T>* to = reinterpret_cast<Four<T>*>(out);
  Four<T> four = {};
  if (kAccumulate) four = *to;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    four.values[i] = Narrow<T>(kAccumulate ? Widen(four.values[i]) + sum[i] : sum[i]);
  }
  *to = four;
}

template <class T, bool kTransposed, bool kAccumulate, bool kFours>
__global__ void __launch_bounds__(kThreads) oft_rotate_kernel2(RotateArguments a) {
  extern __shared__ float4 shared4[];
  float* shared = reinterpret_cast<float*>(shared4);
  const int b = a.b, stride = RotationStride(b), first = blockIdx.x * a.blocks_per_cta;
  const int blocks = min(a.blocks_per_cta, a.blocks - first);
  const int64_t row = blockIdx.y * static_cast<int64_t>(kTileRows);
  const int64_t column = static_cast<int64_t>(first) * b;
  float* r_tile = shared;
  float* x_tile = shared + a.blocks_per_cta * b * stride;
  LoadRotations<kTransposed>(a, first, blocks, r_tile);
  if (kFours) {
    LoadTileByFours<T>(a, row, column, blocks * b, x_tile);
  } else {
    LoadTile<T>(a, row, column, blocks * b, x_tile);
  }
  __syncthreads();
  const int quads = PaddedBlock(b) / kColumnsPerThread;
  const int rows_here = static_cast<int>(min(static_cast<int64_t>(kTileRows), a.rows - row));
  const int strips = (rows_here + kRowsPerThread - 1) / kRowsPerThread;
  T* out = static_cast<T*>(a.out);
  for (int item = threadIdx.x; item < blocks * quads * strips; item += blockDim.x) {
    const int c = item % quads * kColumnsPerThread, block = item / quads % blocks;
    const int r = item / (quads * blocks) * kRowsPerThread;
    float sum[kRowsPerThread][kColumnsPerThread] = {};
    const float* rotation = r_tile + block * b * stride + c;
    const float* x = x_tile + block * b * kTileStride + r;
    for (int k = 0; k < b; ++k) {
      const float4 low = *reinterpret_cast<const float4*>(x + k * kTileStride);
      const float4 high = *reinterpret_cast<const float4*>(x + k * kTileStride + 4);
      const float4 w = *reinterpret_cast<const float4*>(rotation + k * stride);
      const float xs[kRowsPerThread] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      const float ws[kColumnsPerThread] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnsPerThread; ++j) sum[i][j] += xs[i] * ws[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      if (r + i >= rows_here) break;
      T* to = out + (row + r + i) * a.width + column + block * b + c;
      if (kFours) {
        StoreFour<T, kAccumulate>(sum[i], to);
      } else {
        StoreRow<T, kAccumulate>(sum[i], b - c, to);
      }
    }
  }
}

// ---- G = x^T d_out -----------------------------------------------------------------------------

constexpr int kGradientRows = 32;  // staged at a time
constexpr int64_t kSliceRows = 128;
constexpr int64_t kGradientCtas = 1024;  // enough to fill a GPU
constexpr int kGradientThreads = 1024;   // at most

// Slices of the rows, by the shape alone.
int64_t Slices(const Rotation& rotation, int64_t rows) {
  const int64_t most = (kGradientCtas + rotation.blocks() - 1) / rotation.blocks();
  return std::clamp<int64_t>((rows + kSliceRows - 1) / kSliceRows, 1, most);
}

// Threads side by side that take every n-th row, for small blocks.
__host__ __device__ inline int GradientGroups(int b) {
  const int tiles = PaddedBlock(b) / 4 * (PaddedBlock(b) / 4);
  return tiles <= 64 ? 4 : 1;
}

// partial [slices, blocks, b, b]
template <class T>
__global__ void __launch_bounds__(kGradientThreads)
    oft_gradient_kernel2(const T* x, const float* d_out, int64_t rows, int64_t width, int b,
                         int64_t rows_per_slice, float* partial) {
  extern __shared__ float4 shared4[];
  const int padded = PaddedBlock(b), quads = padded / 4, tiles = quads * quads;
  float* x_tile = reinterpret_cast<float*>(shared4);  // [kGradientRows, padded]
  float* d_tile = x_tile + kGradientRows * padded;
  float* joined = d_tile + kGradientRows * padded;  // [padded, padded], with several groups
  const int groups = GradientGroups(b);
  const int group = threadIdx.x / tiles, tile = threadIdx.x % tiles;
  const int i0 = tile / quads * 4, j0 = tile % quads * 4;
  const int64_t column = blockIdx.x * static_cast<int64_t>(b);
  const int64_t begin = blockIdx.y * rows_per_slice, end = min(rows, begin + rows_per_slice);
  // A thread loads one column; there are at least as many threads as columns, and those left over
  // load nothing.
  const int c = threadIdx.x % padded, rows_at_once = blockDim.x / padded;
  const int lane_row = threadIdx.x / padded;
  const int first_row = lane_row < rows_at_once ? lane_row : kGradientRows;
  float sum[4][4] = {};
  for (int64_t row = begin; row < end; row += kGradientRows) {
    __syncthreads();
#pragma unroll 4
    for (int r = first_row; r < kGradientRows; r += rows_at_once) {
      const bool inside = c < b && row + r < end;
      const int64_t from = (row + r) * width + column + c;
      x_tile[r * padded + c] = inside ? Widen(x[from]) : 0.0f;
      d_tile[r * padded + c] = inside ? d_out[from] : 0.0f;
    }
    __syncthreads();
    for (int r = group; r < kGradientRows; r += groups) {
      const float4 xs = *reinterpret_cast<const float4*>(x_tile + r * padded + i0);
      const float4 ds = *reinterpret_cast<const float4*>(d_tile + r * padded + j0);
      const float left[4] = {xs.x, xs.y, xs.z, xs.w}, above[4] = {ds.x, ds.y, ds.z, ds.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += left[i] * above[j];
      }
    }
  }
  for (int other = 1; other < groups; ++other) {  // in a fixed order
    __syncthreads();
    if (group == other) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) joined[(i0 + i) * padded + j0 + j] = sum[i][j];
      }
    }
    __syncthreads();
    if (group == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += joined[(i0 + i) * padded + j0 + j];
      }
    }
  }
  if (group != 0) return;
  float* out = partial + (blockIdx.y * static_cast<int64_t>(gridDim.x) + blockIdx.x) * b * b;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i0 + i < b && j0 + j < b) out[(i0 + i) * b + j0 + j] = sum[i][j];
    }
  }
}

// ---- on tensor cores ---------------------------------------------------------------------------

bool UsesProducts(const Rotation& rotation) {
  constexpr int64_t kLeastBlock = 48;  // three quarters of a tile
  return rotation.block >= kLeastBlock && rotation.block % 4 == 0;
}

qm_status RotateByProducts(qm_call* call, const Rotation& rotation, const float* r, bool transposed,
                           const Rows& in, bool accumulate, const Rows& out) {
  const int64_t b = rotation.block, width = rotation.in_features;
  const Operand blocks = RowMajor(r, QM_F32, b);
  const Product product = {in.rows,
                           b,
                           b,
                           RowMajor(in.data, in.dtype, width),
                           transposed ? Transposed(blocks) : blocks,
                           1.0f,
                           out.data,
                           out.dtype,
                           accumulate};
  return MultiplyBatchCuda(call, product, {rotation.blocks(), b, b * b, b, width}, 1, nullptr);
}

Product GradientProduct(const Rotation& rotation, const Rows& in, const float* d_out) {
  const int64_t b = rotation.block, width = rotation.in_features;
  return {b, b, in.rows, Transposed(RowMajor(in.data, in.dtype, width)),
          RowMajor(d_out, QM_F32, width)};
}

// ---- launches ----------------------------------------------------------------------------------

template <class T, bool kTransposed, bool kAccumulate, bool kFours>
qm_status LaunchRotateParts(qm_call* call, const RotateArguments& a) {
  const auto kernel = oft_rotate_kernel2<T, kTransposed, kAccumulate, kFours>;
  const size_t bytes = sizeof(float) * a.blocks_per_cta * a.b * (RotationStride(a.b) + kTileStride);
  QM_TRY(AllowShared(call, kernel, bytes));
  constexpr int64_t kMostTiles = 65535;  // of grid.y
  for (int64_t first = 0; first < a.rows; first += kMostTiles * kTileRows) {
    RotateArguments part = a;
    part.rows = std::min(a.rows - first, kMostTiles * kTileRows);
    part.in = static_cast<const T*>(a.in) + first * a.width;
    part.out = static_cast<T*>(a.out) + first * a.width;
    const dim3 grid(static_cast<unsigned>((a.blocks + a.blocks_per_cta - 1) / a.blocks_per_cta),
                    static_cast<unsigned>((part.rows + kTileRows - 1) / kTileRows));
    kernel<<<grid, kThreads, bytes, qm::Stream(call)>>>(part);
    QM_CUDA(call, cudaGetLastError());
  }
  return QM_OK;
}

template <class T>
bool FoursAligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Four<T>) == 0;
}

template <class T, bool kTransposed, bool kAccumulate>
qm_status LaunchRotate(qm_call* call, const RotateArguments& a) {
  const bool fours =
      a.b % 4 == 0 && a.width % 4 == 0 && FoursAligned<T>(a.in) && FoursAligned<T>(a.out);
  return fours ? LaunchRotateParts<T, kTransposed, kAccumulate, true>(call, a)
               : LaunchRotateParts<T, kTransposed, kAccumulate, false>(call, a);
}

template <class T>
qm_status LaunchGradient(qm_call* call, const Rotation& rotation, const Rows& in,
                         const float* d_out, int64_t slices, float* partial) {
  const int b = static_cast<int>(rotation.block), padded = PaddedBlock(b);
  const int groups = GradientGroups(b);
  const size_t bytes = sizeof(float) * padded * (2 * kGradientRows + (groups > 1 ? padded : 0));
  QM_TRY(AllowShared(call, oft_gradient_kernel2<T>, bytes));
  const int threads = padded / 4 * (padded / 4) * groups;
  const dim3 grid(static_cast<unsigned>(rotation.blocks()), static_cast<unsigned>(slices));
  oft_gradient_kernel2<T><<<grid, threads, bytes, qm::Stream(call)>>>(
      static_cast<const T*>(in.data), d_out, in.rows, rotation.in_features, b,
      (in.rows + slices - 1) / slices, partial);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

}  // namespace

qm_status RotateCuda(qm_call* call, const Rotation& rotation, const float* r, bool transposed,
                     const Rows& in, bool accumulate, const Rows& out) {
  if (UsesProducts(rotation)) {
    return RotateByProducts(call, rotation, r, transposed, in, accumulate, out);
  }
  const int b = static_cast<int>(rotation.block), blocks = static_cast<int>(rotation.blocks());
  const RotateArguments a = {r,
                             in.data,
                             out.data,
                             in.rows,
                             rotation.in_features,
                             b,
                             blocks,
                             std::clamp(32 / b, 1, blocks)};
  if (transposed) {
    return accumulate ? LaunchRotate<float, true, true>(call, a)
                      : LaunchRotate<float, true, false>(call, a);
  }
  if (in.dtype == QM_F16) return LaunchRotate<qm::F16, false, false>(call, a);
  if (in.dtype == QM_BF16) return LaunchRotate<qm::BF16, false, false>(call, a);
  return LaunchRotate<float, false, false>(call, a);
}

int64_t GradientScratchCuda(const Rotation& rotation) {
  const int64_t partial = (kGradientCtas + rotation.blocks()) * rotation.block * rotation.block;
  return partial + 2 * rotation.elements();  // G, and (dL/dQ)^T
}

qm_status RotationGradientCuda(qm_call* call, const Rotation& rotation, const float* q,
                               const float* r, const Rows& in, const float* d_out, float* d_q,
                               float* scratch) {
  const int64_t numbers = rotation.elements();
  int64_t slices = Slices(rotation, in.rows);
  if (UsesProducts(rotation)) {
    const Product product = GradientProduct(rotation, in, d_out);
    const int64_t b = rotation.block, blocks = rotation.blocks();
    slices = ProductSlices(product, blocks);
    QM_TRY(MultiplyBatchCuda(call, product, {blocks, b, b, 0, b}, slices, scratch));
  } else if (in.dtype == QM_F16) {
    QM_TRY(LaunchGradient<qm::F16>(call, rotation, in, d_out, slices, scratch));
  } else if (in.dtype == QM_BF16) {
    QM_TRY(LaunchGradient<qm::BF16>(call, rotation, in, d_out, slices, scratch));
  } else {
    QM_TRY(LaunchGradient<float>(call, rotation, in, d_out, slices, scratch));
  }
  return SkewGradientCuda(call, rotation, q, r, scratch, static_cast<int>(slices),
                          scratch + slices * numbers, d_q);
}

}  // namespace quantmill::oftq
