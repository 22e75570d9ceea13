// Attention of one query per sequence over many keys (decoding), split over the keys.
//
//   out = sum_j softmax_j(scale * q . k[j]) v[j],   max(0, p - window + 1) <= j <= p = past_length
//
// Every split s of kSplitKeys keys leaves, per head, its maximum m_s, sum l_s and unnormalised o_s;
// a second kernel joins them (Dao et al. 2023, Flash-Decoding):
//   m = max m_s,  out = sum_s exp(m_s - m) o_s / sum_s exp(m_s - m) l_s
// All arithmetic in f32. The split is fixed, so results do not depend on the GPU.
//
// Work: a block takes one split of one kv head of one sequence and kGroup of the query heads that
// share it, so keys and values are read once for all of them. Its four warps take keys in turn,
// kBatch at a time; a lane holds pairs of neighbouring elements 2 * (lane + 32 i), so a warp's read
// of a key is contiguous. The warps' states are joined through shared memory. Bound by memory:
// keys and values are read once.
// Assumed, checked by DecodeAttentionSuits: query_length 1, even head_dim <= 256, bases aligned to
// pairs; scale > 0.
//
// Scratch: per (sequence, head, split) head_dim f32 of o, then m and l of all of them.
#include <cmath>

#include "core/cuda/attention.cuh"
#include "core/cuda/kernel_common.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBatch = 4;  // keys in flight per warp
constexpr int64_t kSplitKeys = 128;

struct Splits {
  int64_t begin;  // first key seen
  int64_t end;
  int count;
};

__host__ __device__ inline Splits SplitsOf(const AttentionArguments& a) {
  Splits s;
  s.end = a.past_length + 1;
  s.begin = a.window > 0 && s.end > a.window ? s.end - a.window : 0;
  s.count = static_cast<int>((s.end - s.begin + kSplitKeys - 1) / kSplitKeys);
  return s;
}

template <typename T, int kPairs>
__device__ __forceinline__ void LoadRow(const T* row, int head_dim, float (&out)[2 * kPairs]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int column = 2 * (lane + i * kWarpSize);
    out[2 * i] = out[2 * i + 1] = 0;
    if (column < head_dim) {
      const Vec<T, 2> pair = *reinterpret_cast<const Vec<T, 2>*>(row + column);
      out[2 * i] = ToFloat(pair.v[0]);
      out[2 * i + 1] = ToFloat(pair.v[1]);
    }
  }
}

// Running softmax state of one query head in one warp.
template <int kPairs>
struct HeadState {
  float m = -INFINITY;
  float l = 0;
  float o[2 * kPairs] = {};
};

// Adds up to kBatch keys, of which the first `count` exist.
template <typename T, int kGroup, int kPairs>
__device__ __forceinline__ void AddKeys(const T* keys, const T* values, int64_t row_stride,
                                        int count, int head_dim,
                                        const float (&q)[kGroup][2 * kPairs],
                                        HeadState<kPairs> (&state)[kGroup]) {
  float k[kBatch][2 * kPairs];
  float v[kBatch][2 * kPairs];
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    // A missing key is read as the first one and gets no weight.
    const int64_t row = (j < count ? j : 0) * static_cast<int64_t>(kWarps) * row_stride;
    LoadRow<T, kPairs>(keys + row, head_dim, k[j]);
    LoadRow<T, kPairs>(values + row, head_dim, v[j]);
  }
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    float s[kBatch];
    float maximum = state[g].m;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      float dot = 0;
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) dot += q[g][i] * k[j][i];
      s[j] = j < count ? WarpSum(dot) : -INFINITY;
      maximum = fmaxf(maximum, s[j]);
    }
    const float correction = expf(state[g].m - maximum);
    state[g].m = maximum;
    state[g].l *= correction;
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) state[g].o[i] *= correction;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const float p = expf(s[j] - maximum);
      state[g].l += p;
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) state[g].o[i] += p * v[j][i];
    }
  }
}

// Joins the four warps' states of one head and writes m, l and o of this split.
template <int kPairs>
__device__ __forceinline__ void JoinWarps(const HeadState<kPairs>& state, int head_dim, float* o,
                                          float* m_out, float* l_out) {
  __shared__ float o_shared[kWarps][64 * kPairs];
  __shared__ float m_shared[kWarps];
  __shared__ float l_shared[kWarps];
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    o_shared[warp][2 * (lane + i * kWarpSize)] = state.o[2 * i];
    o_shared[warp][2 * (lane + i * kWarpSize) + 1] = state.o[2 * i + 1];
  }
  if (lane == 0) {
    m_shared[warp] = state.m;
    l_shared[warp] = state.l;
  }
  __syncthreads();
  float m = m_shared[0];
  for (int w = 1; w < kWarps; ++w) m = fmaxf(m, m_shared[w]);
  float factor[kWarps];
  float l = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    factor[w] = expf(m_shared[w] - m);  // 0 for a warp without keys
    l += factor[w] * l_shared[w];
  }
  for (int d = threadIdx.x; d < head_dim; d += kThreads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += factor[w] * o_shared[w][d];
    o[d] = sum;
  }
  if (threadIdx.x == 0) {
    *m_out = m;
    *l_out = l;
  }
  __syncthreads();  // the next head reuses the shared memory
}

// grid: (splits, kv_heads * groups per kv head, batch)
template <typename T, int kGroup, int kPairs>
__global__ void __launch_bounds__(kThreads)
    DecodeAttentionKernel(AttentionArguments a, int groups, float* __restrict__ scratch) {
  const Splits splits = SplitsOf(a);
  const int per_kv = a.heads / a.kv_heads;
  const int kv_head = blockIdx.y / groups;
  const int first_head = kv_head * per_kv + static_cast<int>(blockIdx.y) % groups * kGroup;
  const int head_end = (kv_head + 1) * per_kv;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t kv_stride = static_cast<int64_t>(a.kv_heads) * a.head_dim;
  const int64_t kv_offset = blockIdx.z * a.capacity * kv_stride + kv_head * a.head_dim;
  const T* q = static_cast<const T*>(a.q) + blockIdx.z * static_cast<int64_t>(a.heads) * a.head_dim;

  float query[kGroup][2 * kPairs];
  HeadState<kPairs> state[kGroup];
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    const int head = min(first_head + g, head_end - 1);  // past the last: computed, not written
    LoadRow<T, kPairs>(q + head * a.head_dim, a.head_dim, query[g]);
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) query[g][i] *= a.scale;
  }

  const int64_t begin = splits.begin + blockIdx.x * kSplitKeys;
  const int64_t end = min(begin + kSplitKeys, splits.end);
  for (int64_t j = begin + warp; j < end; j += kWarps * kBatch) {
    const int count = static_cast<int>(min((end - j + kWarps - 1) / kWarps, int64_t{kBatch}));
    const int64_t offset = kv_offset + j * kv_stride;
    AddKeys<T, kGroup, kPairs>(static_cast<const T*>(a.keys) + offset,
                               static_cast<const T*>(a.values) + offset, kv_stride, count,
                               a.head_dim, query, state);
  }

  float* o = scratch;
  float* m = o + a.batch * a.heads * splits.count * a.head_dim;
  float* l = m + a.batch * a.heads * splits.count;
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    const int head = first_head + g;
    if (head >= head_end) break;  // the same for all threads
    const int64_t slot =
        (blockIdx.z * static_cast<int64_t>(a.heads) + head) * splits.count + blockIdx.x;
    JoinWarps<kPairs>(state[g], a.head_dim, o + slot * a.head_dim, m + slot, l + slot);
  }
}

// One block per (head, sequence); threads over head_dim.
template <typename T>
__global__ void CombineSplitsKernel(AttentionArguments a, const float* __restrict__ scratch) {
  const int count = SplitsOf(a).count;
  const int64_t row = blockIdx.y * static_cast<int64_t>(a.heads) + blockIdx.x;
  const int64_t slots = a.batch * a.heads * count;
  const float* o = scratch + row * count * a.head_dim;
  const float* m = scratch + slots * a.head_dim + row * count;
  const float* l = scratch + slots * (a.head_dim + 1) + row * count;
  float maximum = m[0];
  for (int s = 1; s < count; ++s) maximum = fmaxf(maximum, m[s]);
  float sum = 0;
  for (int s = 0; s < count; ++s) sum += expf(m[s] - maximum) * l[s];
  T* out = static_cast<T*>(a.out) + row * a.head_dim;
  for (int d = threadIdx.x; d < a.head_dim; d += blockDim.x) {
    float total = 0;
    for (int s = 0; s < count; ++s) {
      total += expf(m[s] - maximum) * o[static_cast<int64_t>(s) * a.head_dim + d];
    }
    out[d] = FromFloat<T>(total / sum);
  }
}

template <typename T, int kGroup, int kPairs>
cudaError_t Launch(const AttentionArguments& a, float* scratch, cudaStream_t stream) {
  const int groups = static_cast<int>(CeilDiv(a.heads / a.kv_heads, kGroup));
  const dim3 grid(static_cast<unsigned>(SplitsOf(a).count),
                  static_cast<unsigned>(a.kv_heads * groups), static_cast<unsigned>(a.batch));
  DecodeAttentionKernel<T, kGroup, kPairs><<<grid, kThreads, 0, stream>>>(a, groups, scratch);
  CombineSplitsKernel<T><<<dim3(static_cast<unsigned>(a.heads), static_cast<unsigned>(a.batch)),
                           kThreads, 0, stream>>>(a, scratch);
  return cudaGetLastError();
}

// The smallest group that holds all heads of a kv head, up to four: more would spill registers.
template <typename T, int kPairs>
cudaError_t LaunchForGroup(const AttentionArguments& a, float* scratch, cudaStream_t stream) {
  const int per_kv = a.heads / a.kv_heads;
  if (per_kv == 1) return Launch<T, 1, kPairs>(a, scratch, stream);
  if (per_kv == 2) return Launch<T, 2, kPairs>(a, scratch, stream);
  return Launch<T, 4, kPairs>(a, scratch, stream);
}

}  // namespace

bool DecodeAttentionSuits(const AttentionArguments& a, DType dtype) {
  const auto pair = static_cast<size_t>(2 * ElementSize(dtype));
  return a.query_length == 1 && a.head_dim % 2 == 0 && a.head_dim <= kMaxHeadDim &&
         Aligned(a.q, pair) && Aligned(a.keys, pair) && Aligned(a.values, pair);
}

int64_t DecodeAttentionScratch(const AttentionArguments& a) {
  return a.batch * a.heads * SplitsOf(a).count * (a.head_dim + 2);
}

cudaError_t LaunchDecodeAttention(const AttentionArguments& a, DType dtype, float* scratch,
                                  cudaStream_t stream) {
  if (a.batch == 0) return cudaSuccess;
  if (!DecodeAttentionSuits(a, dtype)) return cudaErrorInvalidValue;
  return DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    if (a.head_dim <= 64) return LaunchForGroup<T, 1>(a, scratch, stream);
    if (a.head_dim <= 128) return LaunchForGroup<T, 2>(a, scratch, stream);
    return LaunchForGroup<T, 4>(a, scratch, stream);
  });
}

}  // namespace quantmill::cuda
