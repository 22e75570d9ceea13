// Attention in f32 arithmetic: for F32 activations, and for head sizes the tensor-core kernel has
// no instance for.
//
//   out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j],   max(0, p - window + 1) <= j <= p,
//   p = past_length + i
//
// The online softmax of attention_prefill.cu, with fused multiply-adds in f32 throughout.
//
// Split of work: a block of 16 x 16 threads takes kQueries queries of one head; thread (y, x) owns
// queries y + 16 r, and of every tile of kKeys keys the scores of keys x + 16 c, and of the output
// the columns 4 x + 64 c .. + 3. Queries, the tile of keys, then of values (in the same place), and
// the probabilities lie in shared memory as f32. The 16 threads x of a query are half a warp, so
// its row maximum and sum are four shuffles. Rows are padded by 4 floats: 16-byte reads of 8
// consecutive keys then touch 32 different banks. head_dim is rounded up to kDim with zeros. Bound
// by arithmetic.
#include <cmath>

#include "core/cuda/attention.cuh"
#include "core/cuda/kernel_common.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kSide = 16;
constexpr int kThreads = kSide * kSide;
constexpr int kKeys = 32;
constexpr int kKeysPerThread = kKeys / kSide;

template <int kDim>
struct Tile {
  static constexpr int kQueriesPerThread = kDim <= 128 ? 4 : 2;  // bounded by registers
  static constexpr int kQueries = kSide * kQueriesPerThread;
  static constexpr int kRow = kDim + 4;              // see above
  static constexpr int kColumns = (kDim + 63) / 64;  // groups of 4 output columns per thread
  static constexpr size_t kSharedBytes =
      sizeof(float) * (kQueries * kRow + kKeys * kRow + kQueries * (kKeys + 1));
};

// Rows [first, first + kRows) of one head as f32; rows from `limit` on and columns from head_dim on
// become 0.
template <typename T, int kDim, int kRows>
__device__ __forceinline__ void CopyRows(const T* source, int64_t row_stride, int64_t first,
                                         int64_t limit, int head_dim, float* shared) {
  for (int i = threadIdx.x; i < kRows * kDim; i += kThreads) {
    const int row = i / kDim;
    const int column = i % kDim;
    float value = 0;
    if (first + row < limit && column < head_dim) {
      value = ToFloat(source[(first + row) * row_stride + column]);
    }
    shared[row * Tile<kDim>::kRow + column] = value;
  }
}

__device__ __forceinline__ float Dot4(float4 a, float4 b, float sum) {
  sum = fmaf(a.x, b.x, sum);
  sum = fmaf(a.y, b.y, sum);
  sum = fmaf(a.z, b.z, sum);
  return fmaf(a.w, b.w, sum);
}

__device__ __forceinline__ float HalfWarpMax(float value) {
#pragma unroll
  for (int offset = kSide / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullMask, value, offset));
  }
  return value;
}

__device__ __forceinline__ float HalfWarpSum(float value) {
#pragma unroll
  for (int offset = kSide / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

template <int kDim>
struct ThreadState {
  static constexpr int kR = Tile<kDim>::kQueriesPerThread;
  static constexpr int kC = Tile<kDim>::kColumns;
  float m[kR];
  float l[kR];
  float4 o[kR][kC];
};

// Scores of the thread's queries and keys, masked; key tile starts at key `j`, query row 0 of the
// block has position `position`.
template <int kDim>
__device__ __forceinline__ void Scores(const float* q, const float* k, int64_t position, int64_t j,
                                       int64_t window, float scale,
                                       float (&s)[ThreadState<kDim>::kR][kKeysPerThread]) {
  constexpr int kR = ThreadState<kDim>::kR;
  constexpr int kRow = Tile<kDim>::kRow;
  const int x = threadIdx.x % kSide;
  const int y = threadIdx.x / kSide;
#pragma unroll
  for (int r = 0; r < kR; ++r) {
#pragma unroll
    for (int c = 0; c < kKeysPerThread; ++c) s[r][c] = 0;
  }
#pragma unroll 4
  for (int d = 0; d < kDim; d += 4) {
    float4 key[kKeysPerThread];
#pragma unroll
    for (int c = 0; c < kKeysPerThread; ++c) {
      key[c] = *reinterpret_cast<const float4*>(k + (x + c * kSide) * kRow + d);
    }
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const float4 query = *reinterpret_cast<const float4*>(q + (y + r * kSide) * kRow + d);
#pragma unroll
      for (int c = 0; c < kKeysPerThread; ++c) s[r][c] = Dot4(query, key[c], s[r][c]);
    }
  }
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    const int64_t p = position + y + r * kSide;
#pragma unroll
    for (int c = 0; c < kKeysPerThread; ++c) {
      const int64_t key = j + x + c * kSide;
      const bool seen = key <= p && (window == 0 || key > p - window);
      s[r][c] = seen ? s[r][c] * scale : -INFINITY;
    }
  }
}

// Updates m and l, rescales o, and leaves the probabilities in shared memory.
template <int kDim>
__device__ __forceinline__ void OnlineSoftmax(
    const float (&s)[ThreadState<kDim>::kR][kKeysPerThread], ThreadState<kDim>& state,
    float* p_shared) {
  const int x = threadIdx.x % kSide;
  const int y = threadIdx.x / kSide;
#pragma unroll
  for (int r = 0; r < ThreadState<kDim>::kR; ++r) {
    float maximum = state.m[r];
#pragma unroll
    for (int c = 0; c < kKeysPerThread; ++c) maximum = fmaxf(maximum, s[r][c]);
    maximum = HalfWarpMax(maximum);
    // No key seen yet: any finite reference keeps exp(-infinity) = 0 free of NaN.
    const float reference = maximum == -INFINITY ? 0.0f : maximum;
    const float correction = expf(state.m[r] - reference);
    float sum = 0;
#pragma unroll
    for (int c = 0; c < kKeysPerThread; ++c) {
      const float p = expf(s[r][c] - reference);
      sum += p;
      p_shared[(y + r * kSide) * (kKeys + 1) + x + c * kSide] = p;
    }
    state.m[r] = maximum;
    state.l[r] = state.l[r] * correction + HalfWarpSum(sum);
#pragma unroll
    for (int c = 0; c < ThreadState<kDim>::kC; ++c) {
      state.o[r][c].x *= correction;
      state.o[r][c].y *= correction;
      state.o[r][c].z *= correction;
      state.o[r][c].w *= correction;
    }
  }
}

template <int kDim>
__device__ __forceinline__ void WeightedValues(const float* p_shared, const float* v,
                                               ThreadState<kDim>& state) {
  const int x = threadIdx.x % kSide;
  const int y = threadIdx.x / kSide;
#pragma unroll 4
  for (int key = 0; key < kKeys; ++key) {
#pragma unroll
    for (int c = 0; c < ThreadState<kDim>::kC; ++c) {
      const int column = 4 * x + 64 * c;
      if (column >= kDim) break;
      const float4 value = *reinterpret_cast<const float4*>(v + key * Tile<kDim>::kRow + column);
#pragma unroll
      for (int r = 0; r < ThreadState<kDim>::kR; ++r) {
        const float p = p_shared[(y + r * kSide) * (kKeys + 1) + key];
        state.o[r][c].x = fmaf(p, value.x, state.o[r][c].x);
        state.o[r][c].y = fmaf(p, value.y, state.o[r][c].y);
        state.o[r][c].z = fmaf(p, value.z, state.o[r][c].z);
        state.o[r][c].w = fmaf(p, value.w, state.o[r][c].w);
      }
    }
  }
}

template <typename T, int kDim>
__device__ __forceinline__ void WriteOut(const ThreadState<kDim>& state, int64_t first,
                                         int64_t query_length, int64_t row_stride, int head_dim,
                                         T* out) {
  const int x = threadIdx.x % kSide;
  const int y = threadIdx.x / kSide;
#pragma unroll
  for (int r = 0; r < ThreadState<kDim>::kR; ++r) {
    const int64_t query = first + y + r * kSide;
    if (query >= query_length) continue;
#pragma unroll
    for (int c = 0; c < ThreadState<kDim>::kC; ++c) {
      const float4 o = state.o[r][c];
      const float values[4] = {o.x, o.y, o.z, o.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 4 * x + 64 * c + i;
        if (column < head_dim) {
          out[query * row_stride + column] = FromFloat<T>(values[i] / state.l[r]);
        }
      }
    }
  }
}

// grid: (heads, batch, tiles of queries from the last to the first)
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads) PlainAttentionKernel(AttentionArguments a) {
  using Config = Tile<kDim>;
  extern __shared__ __align__(16) float shared_f32[];
  float* q_shared = shared_f32;
  float* kv_shared = q_shared + Config::kQueries * Config::kRow;
  float* p_shared = kv_shared + kKeys * Config::kRow;

  const int64_t first = static_cast<int64_t>(gridDim.z - 1 - blockIdx.z) * Config::kQueries;
  const int head = blockIdx.x;
  const int kv_head = head / (a.heads / a.kv_heads);
  const int64_t q_stride = static_cast<int64_t>(a.heads) * a.head_dim;
  const int64_t kv_stride = static_cast<int64_t>(a.kv_heads) * a.head_dim;
  const int64_t q_offset =
      blockIdx.y * a.query_length * q_stride + static_cast<int64_t>(head) * a.head_dim;
  const int64_t kv_offset =
      blockIdx.y * a.capacity * kv_stride + static_cast<int64_t>(kv_head) * a.head_dim;
  const T* k = static_cast<const T*>(a.keys) + kv_offset;
  const T* v = static_cast<const T*>(a.values) + kv_offset;
  const int64_t keys = a.past_length + a.query_length;
  const int64_t position = a.past_length + first;
  const int64_t end = min(keys, position + Config::kQueries);
  const int64_t begin =
      a.window == 0 ? 0 : max(int64_t{0}, position - a.window + 1) / kKeys * kKeys;

  ThreadState<kDim> state;
#pragma unroll
  for (int r = 0; r < ThreadState<kDim>::kR; ++r) {
    state.m[r] = -INFINITY;
    state.l[r] = 0;
#pragma unroll
    for (int c = 0; c < ThreadState<kDim>::kC; ++c) state.o[r][c] = make_float4(0, 0, 0, 0);
  }
  CopyRows<T, kDim, Config::kQueries>(static_cast<const T*>(a.q) + q_offset, q_stride, first,
                                      a.query_length, a.head_dim, q_shared);
  for (int64_t j = begin; j < end; j += kKeys) {
    __syncthreads();  // the values of the tile before are used up
    CopyRows<T, kDim, kKeys>(k, kv_stride, j, keys, a.head_dim, kv_shared);
    __syncthreads();
    float s[ThreadState<kDim>::kR][kKeysPerThread];
    Scores<kDim>(q_shared, kv_shared, position, j, a.window, a.scale, s);
    __syncthreads();  // every thread is done with the keys
    CopyRows<T, kDim, kKeys>(v, kv_stride, j, keys, a.head_dim, kv_shared);
    OnlineSoftmax<kDim>(s, state, p_shared);
    __syncthreads();
    WeightedValues<kDim>(p_shared, kv_shared, state);
  }
  WriteOut<T, kDim>(state, first, a.query_length, q_stride, a.head_dim,
                    static_cast<T*>(a.out) + q_offset);
}

template <typename T, int kDim>
cudaError_t Launch(const AttentionArguments& a, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(PlainAttentionKernel<T, kDim>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, Tile<kDim>::kSharedBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(a.heads), static_cast<unsigned>(a.batch),
                  static_cast<unsigned>(CeilDiv(a.query_length, Tile<kDim>::kQueries)));
  PlainAttentionKernel<T, kDim><<<grid, kThreads, Tile<kDim>::kSharedBytes, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchPlainAttention(const AttentionArguments& a, DType dtype, cudaStream_t stream) {
  if (a.batch == 0 || a.query_length == 0) return cudaSuccess;
  if (a.head_dim < 1 || a.head_dim > kMaxHeadDim) return cudaErrorInvalidValue;
  return DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    if (a.head_dim <= 32) return Launch<T, 32>(a, stream);
    if (a.head_dim <= 64) return Launch<T, 64>(a, stream);
    if (a.head_dim <= 128) return Launch<T, 128>(a, stream);
    return Launch<T, 256>(a, stream);
  });
}

}  // namespace quantmill::cuda
