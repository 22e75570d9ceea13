// Attention of many queries on the tensor cores, without ever storing the scores.
//
//   out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j],   max(0, p - window + 1) <= j <= p,
//   p = past_length + i
//
// The online softmax of Milakov and Gimelshein 2018 over tiles of keys, in the form of Dao 2023
// (FlashAttention-2, section 3.1): a running maximum m, sum l and unnormalised output o per query,
// rescaled when m grows; division by l at the end. Products of 16-bit inputs, sums, m, l and o in
// f32; probabilities are rounded to 16 bits before the product with v.
//
// Split of work: a block takes kBlockQueries = 4 warps x kTilesM x 16 queries of one head of one
// sequence; blocks with the most keys start first. Each warp owns kTilesM tiles of 16 queries, so
// that one fragment of keys or values read from shared memory serves kTilesM products. Keys are
// walked in tiles of kBlockKeys:
//
//     wait K(j)  | issue V(j) |  S = Q K(j)^T  | wait V(j) | issue K(j+1) | softmax | O += P V(j)
//
// so that each copy overlaps the product before its use. Rows in shared memory are padded by 16
// bytes: 8 rows of any supported head_dim then start in 8 different groups of 4 banks, and ldmatrix
// has no bank conflicts.
//
// Assumed, checked by PrefillAttentionSuits: F16/BF16, head_dim 32, 64, 80, 96 or 128, 16-byte
// aligned bases; positions and window below 2^31, scale > 0 (checked by the caller). Bound by
// arithmetic: 4 * queries * keys * head_dim operations per head, half of that where causal.
//
// Versions
//   1  one tile of 16 queries per warp: shared-memory reads limit it to half of the tensor cores
//   2  two tiles per warp, Q fragments read from shared memory again for every tile of keys (in
//      use). H100 80GB HBM3, 2026-11-22, BF16, 32/8 heads, causal half counted: 260 TFLOP/s at
//      2048 x 2048, d 128; 316 at 8192 x 8192; 239 at 2048 x 2048, d 64.
#include <cmath>

#include "core/cuda/attention.cuh"
#include "core/cuda/kernel_common.cuh"
#include "core/cuda/mma.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTilesM = 2;
constexpr int kWarpQueries = kTilesM * 16;
constexpr int kBlockQueries = kWarps * kWarpQueries;
constexpr int kBlockKeys = 64;
constexpr int kTilesN = kBlockKeys / 8;
constexpr float kLog2E = 1.4426950408889634f;

// 2^x with a relative error of 2^-22, one instruction; -infinity gives 0.
__device__ __forceinline__ float Exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

template <int kHeadDim>
constexpr int kRowElements = kHeadDim + 8;  // 16 bytes of padding, see above

template <int kHeadDim>
constexpr size_t kSharedBytes =
    static_cast<size_t>(kBlockQueries + 2 * kBlockKeys) * kRowElements<kHeadDim> * 2;

// Copies rows [first, first + kRows) of one head to shared memory; rows from `limit` on become 0.
template <typename T, int kHeadDim, int kRows>
__device__ __forceinline__ void CopyRows(const T* source, int64_t row_stride, int first, int limit,
                                         T* shared) {
  constexpr int kChunks = kHeadDim / 8;
  for (int c = threadIdx.x; c < kRows * kChunks; c += kThreads) {
    const int row = c / kChunks;
    const int column = c % kChunks * 8;
    const bool valid = first + row < limit;
    const T* from = source + (valid ? first + row : 0) * row_stride + column;
    CopyAsync16(shared + row * kRowElements<kHeadDim> + column, from, valid);
  }
}

// State of one warp: kTilesM tiles of 16 queries. Index [..][4] is a C fragment; m and l have one
// entry per row of a thread (rows g and g + 8).
template <int kHeadDim>
struct WarpState {
  float o[kTilesM][kHeadDim / 8][4];
  float m[kTilesM][2];
  float l[kTilesM][2];
};

// s = q k^T for the warp's queries and one tile of keys.
template <typename T, int kHeadDim>
__device__ __forceinline__ void Scores(const T* q, const T* k, float (&s)[kTilesM][kTilesN][4]) {
  constexpr int kRow = kRowElements<kHeadDim>;
  const int lane = threadIdx.x % kWarpSize;
  const T* q_lane = q + (lane % 16) * kRow + (lane / 16) * 8;
  const T* k_lane = k + (lane % 8 + lane / 16 * 8) * kRow + (lane / 8 % 2) * 8;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = 0;
    }
  }
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    uint32_t a[kTilesM][4];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) LoadMatrix4(a[m], q_lane + m * 16 * kRow + d * 16);
#pragma unroll
    for (int n = 0; n < kTilesN; n += 2) {
      uint32_t b[4];
      LoadMatrix4(b, k_lane + n * 8 * kRow + d * 16);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        Mma<T>(s[m][n], a[m], b[0], b[1]);
        Mma<T>(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Sets scores a query must not see to -infinity. `row`: position of the thread's row g of tile 0;
// `column`: position of the thread's first key.
__device__ __forceinline__ void Mask(int row, int column, int window,
                                     float (&s)[kTilesM][kTilesN][4]) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int position = row + m * 16 + i / 2 * 8;
        const int key = column + n * 8 + i % 2;
        const bool seen = key <= position && (window == 0 || key > position - window);
        if (!seen) s[m][n][i] = -INFINITY;
      }
    }
  }
}

// Turns scores into unnormalised probabilities and rescales the state to the new maximum.
template <int kHeadDim>
__device__ __forceinline__ void OnlineSoftmax(float scale_log2, float (&s)[kTilesM][kTilesN][4],
                                              WarpState<kHeadDim>& state) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // rows g and g + 8
      float maximum = state.m[m][half];
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        maximum = fmaxf(maximum, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
      }
      // The four threads of a quad share the row.
      maximum = fmaxf(maximum, __shfl_xor_sync(kFullMask, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(kFullMask, maximum, 2));
      // No key seen yet: any finite reference keeps exp2(-infinity) = 0 free of NaN.
      const float reference = maximum == -INFINITY ? 0.0f : maximum * scale_log2;
      const float correction = Exp2(state.m[m][half] * scale_log2 - reference);
      state.m[m][half] = maximum;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[m][n][i] = Exp2(s[m][n][i] * scale_log2 - reference);
          sum += s[m][n][i];
        }
      }
      state.l[m][half] = state.l[m][half] * correction + sum;
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
        state.o[m][d][2 * half] *= correction;
        state.o[m][d][2 * half + 1] *= correction;
      }
    }
  }
}

// o += p v; p in the layout of C fragments, which is that of A fragments after packing.
template <typename T, int kHeadDim>
__device__ __forceinline__ void WeightedValues(const float (&p)[kTilesM][kTilesN][4], const T* v,
                                               WarpState<kHeadDim>& state) {
  constexpr int kRow = kRowElements<kHeadDim>;
  const int lane = threadIdx.x % kWarpSize;
  const T* v_lane = v + (lane % 16) * kRow + (lane / 16) * 8;
#pragma unroll
  for (int n = 0; n < kTilesN; n += 2) {  // 16 keys
    uint32_t a[kTilesM][4];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      a[m][0] = PackPair<T>(p[m][n][0], p[m][n][1]);
      a[m][1] = PackPair<T>(p[m][n][2], p[m][n][3]);
      a[m][2] = PackPair<T>(p[m][n + 1][0], p[m][n + 1][1]);
      a[m][3] = PackPair<T>(p[m][n + 1][2], p[m][n + 1][3]);
    }
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; d += 2) {
      uint32_t b[4];
      LoadMatrix4Transposed(b, v_lane + n * 8 * kRow + d * 8);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        Mma<T>(state.o[m][d], a[m], b[0], b[1]);
        Mma<T>(state.o[m][d + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Divides by the sum of probabilities and writes the warp's rows. out: row 0 of this head.
template <typename T, int kHeadDim>
__device__ __forceinline__ void WriteOut(WarpState<kHeadDim>& state, int first_query,
                                         int query_length, int64_t row_stride, T* out) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = state.l[m][half];
      sum += __shfl_xor_sync(kFullMask, sum, 1);
      sum += __shfl_xor_sync(kFullMask, sum, 2);
      const float inverse = 1.0f / sum;
      const int query = first_query + m * 16 + half * 8 + lane / 4;
      if (query >= query_length) continue;
      T* row = out + query * row_stride + lane % 4 * 2;
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
        *reinterpret_cast<uint32_t*>(row + d * 8) =
            PackPair<T>(state.o[m][d][2 * half] * inverse, state.o[m][d][2 * half + 1] * inverse);
      }
    }
  }
}

// grid: (heads, batch, tiles of queries from the last to the first)
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) PrefillAttentionKernel2(AttentionArguments a) {
  extern __shared__ __align__(16) char shared[];
  T* q_shared = reinterpret_cast<T*>(shared);
  T* k_shared = q_shared + kBlockQueries * kRowElements<kHeadDim>;
  T* v_shared = k_shared + kBlockKeys * kRowElements<kHeadDim>;

  const int first = static_cast<int>(gridDim.z - 1 - blockIdx.z) * kBlockQueries;
  const int head = blockIdx.x;
  const int kv_head = head / (a.heads / a.kv_heads);
  const int64_t q_stride = static_cast<int64_t>(a.heads) * kHeadDim;
  const int64_t kv_stride = static_cast<int64_t>(a.kv_heads) * kHeadDim;
  const int64_t q_offset = blockIdx.y * a.query_length * q_stride + head * kHeadDim;
  const int64_t kv_offset = blockIdx.y * a.capacity * kv_stride + kv_head * kHeadDim;
  const T* q = static_cast<const T*>(a.q) + q_offset;
  const T* k = static_cast<const T*>(a.keys) + kv_offset;
  const T* v = static_cast<const T*>(a.values) + kv_offset;
  const int query_length = static_cast<int>(a.query_length);
  const int keys = static_cast<int>(a.past_length) + query_length;
  const int window = static_cast<int>(a.window);

  // Tiles of keys that some query of the block sees.
  const int position = static_cast<int>(a.past_length) + first;
  const int end = min(keys, position + kBlockQueries);
  const int begin = window == 0 ? 0 : max(0, position - window + 1) / kBlockKeys * kBlockKeys;

  CopyRows<T, kHeadDim, kBlockQueries>(q, q_stride, first, query_length, q_shared);
  CopyRows<T, kHeadDim, kBlockKeys>(k, kv_stride, begin, keys, k_shared);
  CommitCopies();

  WarpState<kHeadDim> state;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
    state.m[m][0] = state.m[m][1] = -INFINITY;
    state.l[m][0] = state.l[m][1] = 0;
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state.o[m][d][i] = 0;
    }
  }

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const T* q_warp = q_shared + warp * kWarpQueries * kRowElements<kHeadDim>;
  const int row = position + warp * kWarpQueries + lane / 4;
  const float scale_log2 = a.scale * kLog2E;

  for (int j = begin; j < end; j += kBlockKeys) {
    WaitCopies<0>();
    __syncthreads();  // K(j) is here, and every warp is done with V(j-1)
    CopyRows<T, kHeadDim, kBlockKeys>(v, kv_stride, j, keys, v_shared);
    CommitCopies();
    float s[kTilesM][kTilesN][4];
    Scores<T, kHeadDim>(q_warp, k_shared, s);
    const bool beyond = j + kBlockKeys - 1 > position;  // for the block's first query
    const bool before = window != 0 && j <= position + kBlockQueries - 1 - window;
    if (beyond || before) Mask(row, j + lane % 4 * 2, window, s);
    WaitCopies<0>();
    __syncthreads();  // V(j) is here, and every warp is done with K(j)
    if (j + kBlockKeys < end) {
      CopyRows<T, kHeadDim, kBlockKeys>(k, kv_stride, j + kBlockKeys, keys, k_shared);
      CommitCopies();
    }
    OnlineSoftmax<kHeadDim>(scale_log2, s, state);
    WeightedValues<T, kHeadDim>(s, v_shared, state);
  }
  T* out = static_cast<T*>(a.out) + q_offset;
  WriteOut<T, kHeadDim>(state, first + warp * kWarpQueries, query_length, q_stride, out);
}

template <typename T, int kHeadDim>
cudaError_t Launch(const AttentionArguments& a, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(PrefillAttentionKernel2<T, kHeadDim>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<kHeadDim>);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(a.heads), static_cast<unsigned>(a.batch),
                  static_cast<unsigned>(CeilDiv(a.query_length, kBlockQueries)));
  PrefillAttentionKernel2<T, kHeadDim><<<grid, kThreads, kSharedBytes<kHeadDim>, stream>>>(a);
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchForHeadDim(const AttentionArguments& a, cudaStream_t stream) {
  switch (a.head_dim) {
    case 32:
      return Launch<T, 32>(a, stream);
    case 64:
      return Launch<T, 64>(a, stream);
    case 80:
      return Launch<T, 80>(a, stream);
    case 96:
      return Launch<T, 96>(a, stream);
    case 128:
      return Launch<T, 128>(a, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

bool PrefillAttentionSuits(const AttentionArguments& a, DType dtype) {
  const bool dims = a.head_dim == 32 || a.head_dim == 64 || a.head_dim == 80 || a.head_dim == 96 ||
                    a.head_dim == 128;
  return dims && (dtype == DType::kF16 || dtype == DType::kBF16) && Aligned(a.q, 16) &&
         Aligned(a.keys, 16) && Aligned(a.values, 16) && Aligned(a.out, 16);
}

cudaError_t LaunchPrefillAttention(const AttentionArguments& a, DType dtype, cudaStream_t stream) {
  if (a.batch == 0 || a.query_length == 0) return cudaSuccess;
  if (!PrefillAttentionSuits(a, dtype)) return cudaErrorInvalidValue;
  return dtype == DType::kF16 ? LaunchForHeadDim<__half>(a, stream)
                              : LaunchForHeadDim<__nv_bfloat16>(a, stream);
}

}  // namespace quantmill::cuda
