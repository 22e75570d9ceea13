// Rotary position embedding, halves form (Su et al. 2021, section 3.4; the pairing of element i
// with i + head_dim / 2 is that of the Llama checkpoints of Hugging Face).
//
//   a = x[r, h, i], b = x[r, h, i + half], c = cosine[p, i], s = sine[p, i], half = head_dim / 2
//   x[r, h, i]        = a * c - b * s
//   x[r, h, i + half] = b * c + a * s
//
// p = first_position + r % length. x: [rows, heads * head_dim]; tables f32 [positions, half].
//
// Work: a grid-stride loop over groups of N pairs of one head, N pairs per thread with one vector
// access per half; N = 16 bytes' worth where half and alignment allow, else 1. Bound by memory:
// 2 * rows * heads * head_dim elements; the tables stay in L2 across heads.
//
// Versions
//   1  one pair per thread
//   2  N pairs per thread (in use)
#include "core/cuda/kernel_common.cuh"
#include "core/cuda/rope.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T, int N>
__global__ void RopeKernel2(const float* __restrict__ cosine, const float* __restrict__ sine,
                            int64_t first_position, int64_t length, int64_t rows, int64_t heads,
                            int64_t half, T* __restrict__ x) {
  const int64_t groups = half / N;  // per head
  const int64_t total = rows * heads * groups;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t index = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; index < total;
       index += threads) {
    const int64_t i = index % groups * N;
    const int64_t row_head = index / groups;
    const int64_t position = first_position + row_head / heads % length;
    float c[N];
    float s[N];
    LoadAs(cosine, DType::kF32, position * half + i, c);
    LoadAs(sine, DType::kF32, position * half + i, s);
    auto* low = reinterpret_cast<Vec<T, N>*>(x + row_head * 2 * half + i);
    auto* high = reinterpret_cast<Vec<T, N>*>(x + row_head * 2 * half + half + i);
    Vec<T, N> a = *low;
    Vec<T, N> b = *high;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float first = ToFloat(a.v[j]);
      const float second = ToFloat(b.v[j]);
      a.v[j] = FromFloat<T>(first * c[j] - second * s[j]);
      b.v[j] = FromFloat<T>(second * c[j] + first * s[j]);
    }
    *low = a;
    *high = b;
  }
}

}  // namespace

cudaError_t LaunchRope(const float* cosine, const float* sine, int64_t first_position,
                       int64_t length, int64_t rows, int64_t heads, int64_t head_dim, DType dtype,
                       void* x, cudaStream_t stream) {
  const int64_t half = head_dim / 2;
  if (rows * heads * half == 0) return cudaSuccess;
  return DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int kN = kVec16<T>;
    T* values = static_cast<T*>(x);
    if (half % kN == 0 && Aligned(x, 16)) {
      RopeKernel2<T, kN><<<GridFor(rows * heads * (half / kN), kThreads), kThreads, 0, stream>>>(
          cosine, sine, first_position, length, rows, heads, half, values);
    } else {
      RopeKernel2<T, 1><<<GridFor(rows * heads * half, kThreads), kThreads, 0, stream>>>(
          cosine, sine, first_position, length, rows, heads, half, values);
    }
    return cudaGetLastError();
  });
}

}  // namespace quantmill::cuda
