// Backward pass of causal grouped-query attention on the tensor cores, without ever storing the
// scores (Dao 2023, FlashAttention-2, algorithm 2). Per head, with queries i and keys j:
//
//   p[i, j] = exp(scale q[i] . k[j] - lse[i]),  lse[i] = log sum_j exp(scale q[i] . k[j])
//   d_p[i, j] = d_out[i] . v[j],                mean[i] = sum_j p[i, j] d_p[i, j]
//   d_s[i, j] = p[i, j] (d_p[i, j] - mean[i])
//   d_q[i] = scale sum_j d_s[i, j] k[j]
//   d_k[j] = scale sum_i d_s[i, j] q[i],  d_v[j] = sum_i p[i, j] d_out[i],  over the heads that
//                                                                          share keys
//
// Products of 16-bit inputs, all sums in f32; p and d_s are rounded to 16 bits as factors. Neither
// the output of attention nor lse is an input: lse and mean are computed again.
//
// Split of work. QueryGradientKernel: a block takes 4 warps x 16 queries of one head of one
// sequence and walks over its keys twice, first for lse (an online softmax: a running maximum and
// sums that are rescaled when it grows) and mean, which it also stores, then for d_q.
// PairGradientKernel: a block takes 4 warps x 16 keys of one head of keys and walks over the
// queries that see them, head after head; scores are computed transposed, so that keys are the rows
// of a warp's tiles and nothing is summed over warps. No atomics: sums have a fixed order.
//
// In both kernels the block's own rows stay in shared memory, tiles of the other side come in two
// buffers, the next tile's copy under way during the products of this one. Rows are padded by 16
// bytes: 8 rows then start in 8 different groups of 4 banks (core/cuda/attention_prefill.cu).
//
// Assumed, checked by AttentionBackwardSuits: F16/BF16, head_dim 64 or 128, 16-byte aligned bases,
// scale > 0. Bound by arithmetic: 18 * queries * keys * head_dim operations per head, half of that
// where causal.
//
// Versions
//   1  as described (in use): 4.85 ms for 10 layers of 32 x 1024 positions, 6 heads on 2, head_dim
//      64, bf16 (H200, 2026-11-29)
#include <cmath>

#include "core/cuda/kernel_common.cuh"
#include "core/cuda/mma.cuh"
#include "core/train/attention_backward.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kWarpRows = 16;
constexpr int kBlockRows = kWarps * kWarpRows;
constexpr float kLog2E = 1.4426950408889634f;

// Rows of the tiles that a block walks over: what registers leave room for.
template <int kHeadDim>
constexpr int kTileRows = kHeadDim <= 64 ? 64 : 32;
template <int kHeadDim>
constexpr int kTilesN = kTileRows<kHeadDim> / 8;
template <int kHeadDim>
constexpr int kRowElements = kHeadDim + 8;  // 16 bytes of padding, see above

// Blocks per multiprocessor that the registers of PairGradientKernel must leave room for.
template <int kHeadDim>
constexpr int kBlocks = kHeadDim <= 64 ? 3 : 2;

// Two blocks of rows, two buffers of two tiles; two f32 values per tile row in each buffer.
template <int kHeadDim>
constexpr size_t kMatrixBytes =
    static_cast<size_t>(2 * kBlockRows + 4 * kTileRows<kHeadDim>) * kRowElements<kHeadDim> * 2;
template <int kHeadDim>
constexpr size_t kSharedBytes = kMatrixBytes<kHeadDim> +
                                static_cast<size_t>(4 * kTileRows<kHeadDim>) * sizeof(float);

// 2^x with a relative error of 2^-22, one instruction; -infinity gives 0.
__device__ __forceinline__ float Exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Copies 4 bytes to shared memory without waiting; writes zeros instead when !valid.
__device__ __forceinline__ void CopyAsync4(void* shared, const void* global, bool valid) {
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(target), "l"(global),
               "r"(bytes)
               : "memory");
}

// Copies rows [first, first + kRows) of one head to shared memory; rows from `limit` on become 0.
template <typename T, int kHeadDim, int kRows>
__device__ __forceinline__ void CopyRows(const T* source, int64_t row_stride, int first, int limit,
                                         T* shared) {
  constexpr int kChunks = kHeadDim / 8;
  constexpr int kRowsAtOnce = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kRowsAtOnce == 0);
  const int row = static_cast<int>(threadIdx.x) / kChunks;
  const int column = static_cast<int>(threadIdx.x) % kChunks * 8;
#pragma unroll
  for (int i = 0; i < kRows; i += kRowsAtOnce) {
    const bool valid = first + row + i < limit;
    const T* from = source + (valid ? first + row + i : 0) * row_stride + column;
    CopyAsync16(shared + (row + i) * kRowElements<kHeadDim> + column, from, valid);
  }
}

// c = a b^T. a: the warp's 16 rows, b: the rows of a tile, both in shared memory. Index [n][..] of
// c is the C fragment of columns 8 n .. 8 n + 7.
template <typename T, int kHeadDim>
__device__ __forceinline__ void RowProducts(const T* a, const T* b,
                                            float (&c)[kTilesN<kHeadDim>][4]) {
  constexpr int kRow = kRowElements<kHeadDim>;
  const int lane = threadIdx.x % kWarpSize;
  const T* a_lane = a + (lane % 16) * kRow + (lane / 16) * 8;
  const T* b_lane = b + (lane % 8 + lane / 16 * 8) * kRow + (lane / 8 % 2) * 8;
#pragma unroll
  for (int n = 0; n < kTilesN<kHeadDim>; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = 0;
  }
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    uint32_t a_part[4];
    LoadMatrix4(a_part, a_lane + d * 16);
#pragma unroll
    for (int n = 0; n < kTilesN<kHeadDim>; n += 2) {
      uint32_t b_part[4];
      LoadMatrix4(b_part, b_lane + n * 8 * kRow + d * 16);
      Mma<T>(c[n], a_part, b_part[0], b_part[1]);
      Mma<T>(c[n + 1], a_part, b_part[2], b_part[3]);
    }
  }
}

// sum += c rows, c rounded; c in the layout of C fragments, which is that of A fragments after
// packing. rows: those of a tile, in shared memory.
template <typename T, int kHeadDim>
__device__ __forceinline__ void AddWeightedRows(const float (&c)[kTilesN<kHeadDim>][4],
                                                const T* rows, float (&sum)[kHeadDim / 8][4]) {
  constexpr int kRow = kRowElements<kHeadDim>;
  const int lane = threadIdx.x % kWarpSize;
  const T* row_lane = rows + (lane % 16) * kRow + (lane / 16) * 8;
#pragma unroll
  for (int n = 0; n < kTilesN<kHeadDim>; n += 2) {  // 16 rows
    const uint32_t a[4] = {PackPair<T>(c[n][0], c[n][1]), PackPair<T>(c[n][2], c[n][3]),
                           PackPair<T>(c[n + 1][0], c[n + 1][1]),
                           PackPair<T>(c[n + 1][2], c[n + 1][3])};
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; d += 2) {
      uint32_t b[4];
      LoadMatrix4Transposed(b, row_lane + n * 8 * kRow + d * 8);
      Mma<T>(sum[d], a, b[0], b[1]);
      Mma<T>(sum[d + 1], a, b[2], b[3]);
    }
  }
}

template <int kN>
__device__ __forceinline__ void SetZero(float (&c)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = 0;
  }
}

// Writes `factor` times the warp's rows [first, first + 16), those below `limit`. out: row 0 of the
// head.
template <int kHeadDim>
__device__ __forceinline__ void WriteRows(const float (&sum)[kHeadDim / 8][4], float factor,
                                          int first, int limit, int64_t row_stride, float* out) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // rows g and g + 8
    const int row = first + half * 8 + lane / 4;
    if (row >= limit) continue;
    float* to = out + row * row_stride + lane % 4 * 2;
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; ++d) {
      *reinterpret_cast<float2*>(to + d * 8) =
          make_float2(sum[d][2 * half] * factor, sum[d][2 * half + 1] * factor);
    }
  }
}

__device__ __forceinline__ bool Sees(int query, int key, int window) {
  return key <= query && (window == 0 || key > query - window);
}

// Sums over the four threads of a quad, which share a row.
__device__ __forceinline__ float QuadSum(float value) {
  value += __shfl_xor_sync(kFullMask, value, 1);
  return value + __shfl_xor_sync(kFullMask, value, 2);
}

// What the first walk over keys finds out, per row of a thread (g and g + 8). `sum` and `weighted`
// cover the thread's columns only.
struct RowStatistics {
  float maximum[2];   // of scores, unscaled
  float sum[2];       // of e = 2^(scale_log2 (score - maximum))
  float weighted[2];  // of e d_p
};

template <int kN>
__device__ __forceinline__ void AddStatistics(const float (&s)[kN][4], const float (&d_p)[kN][4],
                                              float scale_log2, RowStatistics& state) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float maximum = state.maximum[half];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      maximum = fmaxf(maximum, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    }
    maximum = fmaxf(maximum, __shfl_xor_sync(kFullMask, maximum, 1));
    maximum = fmaxf(maximum, __shfl_xor_sync(kFullMask, maximum, 2));
    // No key seen yet: any finite reference keeps exp2(-infinity) = 0 free of NaN.
    const float reference = maximum == -INFINITY ? 0.0f : maximum * scale_log2;
    const float correction = Exp2(state.maximum[half] * scale_log2 - reference);
    float sum = 0, weighted = 0;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        const float e = Exp2(s[n][i] * scale_log2 - reference);
        sum += e;
        weighted += e * d_p[n][i];
      }
    }
    state.maximum[half] = maximum;
    state.sum[half] = state.sum[half] * correction + sum;
    state.weighted[half] = state.weighted[half] * correction + weighted;
  }
}

// The tiles of a walk: rows of keys and values, or of queries and their outputs' gradients.
template <typename T, int kHeadDim>
struct Buffers {
  T *first, *second;  // the block's own rows
  T* tiles;           // [2 buffers][2][kTileRows]
  float* statistics;  // [2 buffers][2][kTileRows]

  __device__ explicit Buffers(char* shared)
      : first(reinterpret_cast<T*>(shared)),
        second(first + kBlockRows * kRowElements<kHeadDim>),
        tiles(second + kBlockRows * kRowElements<kHeadDim>),
        statistics(reinterpret_cast<float*>(shared + kMatrixBytes<kHeadDim>)) {}
  __device__ T* Tile(int buffer, int which) const {
    return tiles + (buffer * 2 + which) * kTileRows<kHeadDim> * kRowElements<kHeadDim>;
  }
  __device__ float* Statistics(int buffer, int which) const {
    return statistics + (buffer * 2 + which) * kTileRows<kHeadDim>;
  }
};

// d_q, and for the other kernel statistics[0] = lse / ln 2 and statistics[1] = mean, each
// [batch, heads, length]. grid: (heads, batch, blocks of queries from the last to the first).
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 3) QueryGradientKernel1(AttentionBackward a) {
  constexpr int kTile = kTileRows<kHeadDim>;
  extern __shared__ __align__(16) char shared[];
  const Buffers<T, kHeadDim> buffers(shared);
  const int length = static_cast<int>(a.length);
  const int window = static_cast<int>(a.window);
  const int first = static_cast<int>(gridDim.z - 1 - blockIdx.z) * kBlockRows;
  const int head = blockIdx.x;
  const int64_t q_stride = static_cast<int64_t>(a.heads) * kHeadDim;
  const int64_t kv_stride = static_cast<int64_t>(a.kv_heads) * kHeadDim;
  const int64_t q_offset = blockIdx.y * a.length * q_stride + head * kHeadDim;
  const int64_t kv_offset =
      blockIdx.y * a.length * kv_stride + head / (a.heads / a.kv_heads) * kHeadDim;
  const T* keys = static_cast<const T*>(a.keys) + kv_offset;
  const T* values = static_cast<const T*>(a.values) + kv_offset;

  // Tiles of keys that some query of the block sees; walked over twice.
  const int end = min(length, first + kBlockRows);
  const int begin = window == 0 ? 0 : max(0, first - window + 1) / kTile * kTile;
  const int tiles = (end - begin + kTile - 1) / kTile;
  const auto copy = [&](int step) {
    const int key = begin + (step < tiles ? step : step - tiles) * kTile;
    CopyRows<T, kHeadDim, kTile>(keys, kv_stride, key, length, buffers.Tile(step % 2, 0));
    CopyRows<T, kHeadDim, kTile>(values, kv_stride, key, length, buffers.Tile(step % 2, 1));
  };

  CopyRows<T, kHeadDim, kBlockRows>(static_cast<const T*>(a.q) + q_offset, q_stride, first, length,
                                    buffers.first);
  CopyRows<T, kHeadDim, kBlockRows>(static_cast<const T*>(a.d_out) + q_offset, q_stride, first,
                                    length, buffers.second);
  copy(0);
  CommitCopies();

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const T* q_warp = buffers.first + warp * kWarpRows * kRowElements<kHeadDim>;
  const T* d_out_warp = buffers.second + warp * kWarpRows * kRowElements<kHeadDim>;
  const int row = first + warp * kWarpRows + lane / 4;
  const float scale_log2 = a.scale * kLog2E;

  float s[kTilesN<kHeadDim>][4], d_p[kTilesN<kHeadDim>][4];
  // Scores of the tile of this step, -infinity where a query does not see a key, and d_p.
  const auto products = [&](int step) {
    const int key = begin + (step < tiles ? step : step - tiles) * kTile;
    if (step + 1 < 2 * tiles) copy(step + 1);
    CommitCopies();
    WaitCopies<1>();
    __syncthreads();  // this step's tile is here
    RowProducts<T, kHeadDim>(q_warp, buffers.Tile(step % 2, 0), s);
    RowProducts<T, kHeadDim>(d_out_warp, buffers.Tile(step % 2, 1), d_p);
    const bool beyond = key + kTile - 1 > first;  // for the block's first query
    const bool before = window != 0 && key <= first + kBlockRows - 1 - window;
    if (!beyond && !before) return;
#pragma unroll
    for (int n = 0; n < kTilesN<kHeadDim>; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!Sees(row + i / 2 * 8, key + lane % 4 * 2 + n * 8 + i % 2, window)) s[n][i] = -INFINITY;
      }
    }
  };

  RowStatistics state = {{-INFINITY, -INFINITY}, {0, 0}, {0, 0}};
  for (int step = 0; step < tiles; ++step) {
    products(step);
    AddStatistics(s, d_p, scale_log2, state);
    __syncthreads();  // every warp is done with this step's tile
  }
  float lse[2], mean[2];
  const int64_t rows = a.batch * a.heads * a.length;
  float* statistics = a.statistics + (blockIdx.y * a.heads + head) * a.length;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = QuadSum(state.sum[half]);
    lse[half] = state.maximum[half] * scale_log2 + log2f(sum);
    mean[half] = QuadSum(state.weighted[half]) / sum;
    if (lane % 4 == 0 && row + half * 8 < length) {
      statistics[row + half * 8] = lse[half];
      statistics[rows + row + half * 8] = mean[half];
    }
  }

  float d_q[kHeadDim / 8][4];
  SetZero(d_q);
  for (int step = tiles; step < 2 * tiles; ++step) {
    products(step);
#pragma unroll
    for (int n = 0; n < kTilesN<kHeadDim>; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = Exp2(s[n][i] * scale_log2 - lse[i / 2]) * (d_p[n][i] - mean[i / 2]);
      }
    }
    AddWeightedRows<T, kHeadDim>(s, buffers.Tile(step % 2, 0), d_q);
    __syncthreads();  // every warp is done with this step's tile
  }
  WriteRows<kHeadDim>(d_q, a.scale, first + warp * kWarpRows, length, q_stride, a.d_q + q_offset);
}

// d_keys and d_values, from the statistics of the other kernel. grid: (kv_heads, batch, blocks of
// keys from the first, which most queries see, to the last).
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kBlocks<kHeadDim>)
    PairGradientKernel1(AttentionBackward a) {
  constexpr int kTile = kTileRows<kHeadDim>;
  static_assert(kBlockRows % kTile == 0);  // the first tile of queries begins with the block's keys
  extern __shared__ __align__(16) char shared[];
  const Buffers<T, kHeadDim> buffers(shared);
  const int length = static_cast<int>(a.length);
  const int window = static_cast<int>(a.window);
  const int first = static_cast<int>(blockIdx.z) * kBlockRows;
  const int group = a.heads / a.kv_heads;
  const int64_t q_stride = static_cast<int64_t>(a.heads) * kHeadDim;
  const int64_t kv_stride = static_cast<int64_t>(a.kv_heads) * kHeadDim;
  const int64_t q_offset = blockIdx.y * a.length * q_stride + blockIdx.x * group * kHeadDim;
  const int64_t kv_offset = blockIdx.y * a.length * kv_stride + blockIdx.x * kHeadDim;
  const T* q = static_cast<const T*>(a.q) + q_offset;
  const T* d_out = static_cast<const T*>(a.d_out) + q_offset;
  const int64_t rows = a.batch * a.heads * a.length;
  const float* statistics = a.statistics + (blockIdx.y * a.heads + blockIdx.x * group) * a.length;

  // Tiles of queries that see some key of the block, for each head of the group.
  const int end = window == 0 ? length : min(length, first + kBlockRows - 1 + window);
  const int tiles = (end - first + kTile - 1) / kTile;
  const int steps = group * tiles;
  int next_head = 0, next_query = first;  // of the tile to copy next
  const auto copy = [&](int step) {
    const int head = next_head, query = next_query;
    next_query += kTile;
    if (next_query >= end) {
      next_query = first;
      ++next_head;
    }
    const int buffer = step % 2;
    CopyRows<T, kHeadDim, kTile>(q + head * kHeadDim, q_stride, query, length,
                                 buffers.Tile(buffer, 0));
    CopyRows<T, kHeadDim, kTile>(d_out + head * kHeadDim, q_stride, query, length,
                                 buffers.Tile(buffer, 1));
    if (threadIdx.x < 2 * kTile) {
      const int which = static_cast<int>(threadIdx.x) / kTile;
      const int at = static_cast<int>(threadIdx.x) % kTile;
      const bool valid = query + at < length;
      const float* from = statistics + which * rows + head * a.length + (valid ? query + at : 0);
      CopyAsync4(buffers.Statistics(buffer, which) + at, from, valid);
    }
  };

  CopyRows<T, kHeadDim, kBlockRows>(static_cast<const T*>(a.keys) + kv_offset, kv_stride, first,
                                    length, buffers.first);
  CopyRows<T, kHeadDim, kBlockRows>(static_cast<const T*>(a.values) + kv_offset, kv_stride, first,
                                    length, buffers.second);
  copy(0);
  CommitCopies();

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const T* k_warp = buffers.first + warp * kWarpRows * kRowElements<kHeadDim>;
  const T* v_warp = buffers.second + warp * kWarpRows * kRowElements<kHeadDim>;
  const int row = first + warp * kWarpRows + lane / 4;
  const float scale_log2 = a.scale * kLog2E;

  float d_k[kHeadDim / 8][4], d_v[kHeadDim / 8][4];
  SetZero(d_k);
  SetZero(d_v);
  int query = first;
  for (int step = 0; step < steps; ++step) {
    const int buffer = step % 2;
    if (step + 1 < steps) copy(step + 1);
    CommitCopies();
    WaitCopies<1>();
    __syncthreads();                                           // this step's tile is here
    float p[kTilesN<kHeadDim>][4], d_p[kTilesN<kHeadDim>][4];  // rows keys, columns queries
    RowProducts<T, kHeadDim>(k_warp, buffers.Tile(buffer, 0), p);
    RowProducts<T, kHeadDim>(v_warp, buffers.Tile(buffer, 1), d_p);
    const bool whole = query >= first + kBlockRows - 1 && query + kTile <= length &&
                       (window == 0 || query + kTile <= first + window);
    const float* lse = buffers.Statistics(buffer, 0) + lane % 4 * 2;
    const float* mean = buffers.Statistics(buffer, 1) + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kTilesN<kHeadDim>; ++n) {
      const float2 lse_pair = *reinterpret_cast<const float2*>(lse + n * 8);
      const float2 mean_pair = *reinterpret_cast<const float2*>(mean + n * 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = query + lane % 4 * 2 + n * 8 + i % 2;
        const bool seen = whole || (column < length && Sees(column, row + i / 2 * 8, window));
        const float share = Exp2(p[n][i] * scale_log2 - (i % 2 == 0 ? lse_pair.x : lse_pair.y));
        p[n][i] = seen ? share : 0.0f;
        d_p[n][i] = p[n][i] * (d_p[n][i] - (i % 2 == 0 ? mean_pair.x : mean_pair.y));
      }
    }
    AddWeightedRows<T, kHeadDim>(p, buffers.Tile(buffer, 1), d_v);
    AddWeightedRows<T, kHeadDim>(d_p, buffers.Tile(buffer, 0), d_k);
    query = query + kTile < end ? query + kTile : first;
    __syncthreads();  // every warp is done with this step's tile
  }
  const int warp_first = first + warp * kWarpRows;
  WriteRows<kHeadDim>(d_k, a.scale, warp_first, length, kv_stride, a.d_keys + kv_offset);
  WriteRows<kHeadDim>(d_v, 1.0f, warp_first, length, kv_stride, a.d_values + kv_offset);
}

template <typename T, int kHeadDim>
cudaError_t Launch(const AttentionBackward& a, cudaStream_t stream) {
  constexpr size_t kBytes = kSharedBytes<kHeadDim>;
  for (const auto kernel : {QueryGradientKernel1<T, kHeadDim>, PairGradientKernel1<T, kHeadDim>}) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
  }
  const auto batch = static_cast<unsigned>(a.batch);
  const auto blocks = static_cast<unsigned>(CeilDiv(a.length, kBlockRows));
  QueryGradientKernel1<T, kHeadDim>
      <<<dim3(static_cast<unsigned>(a.heads), batch, blocks), kThreads, kBytes, stream>>>(a);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  PairGradientKernel1<T, kHeadDim>
      <<<dim3(static_cast<unsigned>(a.kv_heads), batch, blocks), kThreads, kBytes, stream>>>(a);
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchForHeadDim(const AttentionBackward& a, cudaStream_t stream) {
  return a.head_dim == 64 ? Launch<T, 64>(a, stream) : Launch<T, 128>(a, stream);
}

}  // namespace

bool AttentionBackwardSuits(const AttentionBackward& a, DType dtype) {
  constexpr int64_t kMaxGrid = 65535;      // y and z
  constexpr int64_t kMaxLength = 1 << 21;  // blocks of queries within kMaxGrid
  const bool aligned = Aligned(a.q, 16) && Aligned(a.keys, 16) && Aligned(a.values, 16) &&
                       Aligned(a.d_out, 16) && Aligned(a.d_q, 8) && Aligned(a.d_keys, 8) &&
                       Aligned(a.d_values, 8);
  return (a.head_dim == 64 || a.head_dim == 128) &&
         (dtype == DType::kF16 || dtype == DType::kBF16) && aligned && a.scale > 0 &&
         a.batch <= kMaxGrid && a.length <= kMaxLength && a.window <= INT32_MAX / 2;
}

cudaError_t LaunchAttentionBackward(const AttentionBackward& a, DType dtype, cudaStream_t stream) {
  if (a.batch == 0 || a.length == 0) return cudaSuccess;
  if (!AttentionBackwardSuits(a, dtype)) return cudaErrorInvalidValue;
  return dtype == DType::kF16 ? LaunchForHeadDim<__half>(a, stream)
                              : LaunchForHeadDim<__nv_bfloat16>(a, stream);
}

}  // namespace quantmill::cuda
