// Backward pass of an embedding:
//
//   table[ids[i], :] += d_rows[i, :], rows i in order
//
// ids: i32 [rows] in [0, vocab), d_rows: f32 [rows, width], table: f32 [vocab, width]. CPU
// reference: DoEmbed of cpu_ops.cc, with the same sums to the bit.
//
// Work: a block owns kThreads * kColumns columns of one row of the table, searches all ids for its
// own and adds the rows it finds: no atomics, so that equal ids add up in a fixed order. Ids are
// searched in tiles; the rows found in a tile are listed in order by counting bits of ballots and
// added kAhead at a time, so that their loads overlap (a frequent id has thousands of rows).
// vocab * rows * 4 bytes are read from L2 (1 GB for 8192 ids in 32768 rows), d_rows once from
// memory.
//
// Versions
//   1  a thread per column that goes through all rows: a read and a write of memory per row, one
//      after the other
//   2  a block per id (in use): 0.29 ms for 32,768 rows of 384 into 8192 (H200, 2026-11-29)
#include "core/cuda/kernel_common.cuh"
#include "core/train/backward_kernels.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kColumns = 4;  // per thread
constexpr int kIds = 8;      // per thread and tile
constexpr int kAhead = 8;    // rows loaded at once
constexpr int kTile = kThreads * kIds;
constexpr int kWords = kTile / 32;  // of bits, one per id of a tile

// Lists the rows of a tile that hold `id`, ascending; how many, the same on every thread. Ends with
// a barrier before the list is read; the caller places one before the next call.
__device__ __forceinline__ int FindRows(const int32_t* ids, int64_t rows, int64_t tile, int32_t id,
                                        uint32_t* words, int* list) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  bool own = false;
#pragma unroll
  for (int k = 0; k < kIds; ++k) {  // word w holds ids 32 w .. 32 w + 31 of the tile
    const int64_t row = tile + k * kThreads + threadIdx.x;
    const bool match = row < rows && ids[row] == id;
    const uint32_t bits = __ballot_sync(kFullMask, match);
    if (lane == 0) words[k * kWarps + warp] = bits;
    own |= match;
  }
  if (__syncthreads_or(own) == 0) return 0;
  int total = 0;
  for (int w = 0; w < kWords; ++w) {
    const uint32_t bits = words[w];
    if (w % kWarps == warp && (bits >> lane & 1) != 0) {
      list[total + __popc(bits & ((1u << lane) - 1))] = w * 32 + lane;
    }
    total += __popc(bits);
  }
  __syncthreads();
  return total;
}

// grid: (vocab, tiles of columns)
__global__ void __launch_bounds__(kThreads)
    EmbedBackwardKernel2(const int32_t* ids, const float* d_rows, int64_t rows, int64_t width,
                         float* table) {
  __shared__ uint32_t words[kWords];
  __shared__ int list[kTile];
  const auto id = static_cast<int32_t>(blockIdx.x);
  const int64_t column = blockIdx.y * static_cast<int64_t>(kThreads * kColumns) + threadIdx.x;
  float* target = table + id * width;
  float sum[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int64_t at = column + c * kThreads;
    sum[c] = at < width ? target[at] : 0.0f;
  }
  bool changed = false;
  for (int64_t tile = 0; tile < rows; tile += kTile) {
    const int found = FindRows(ids, rows, tile, id, words, list);
    for (int i = 0; i < found; i += kAhead) {
      float values[kAhead][kColumns];
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
        const float* from = d_rows + (tile + (i + r < found ? list[i + r] : 0)) * width;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int64_t at = column + c * kThreads;
          values[r][c] = i + r < found && at < width ? from[at] : 0.0f;
        }
      }
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (i + r < found) sum[c] += values[r][c];
        }
      }
    }
    changed |= found > 0;
    __syncthreads();  // every thread is done with words and list
  }
  if (!changed) return;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int64_t at = column + c * kThreads;
    if (at < width) target[at] = sum[c];
  }
}

}  // namespace

cudaError_t LaunchEmbedBackward(const int32_t* ids, const float* d_rows, int64_t rows,
                                int64_t vocab, int64_t width, float* table, cudaStream_t stream) {
  if (rows == 0 || vocab == 0 || width == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(vocab),
                  static_cast<unsigned>(CeilDiv(width, kThreads * kColumns)));
  EmbedBackwardKernel2<<<grid, kThreads, 0, stream>>>(ids, d_rows, rows, width, table);
  return cudaGetLastError();
}

}  // namespace quantmill::cuda
