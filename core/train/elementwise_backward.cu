// Backward passes that work on single elements or pairs.
//
//   y = silu(g) u, silu(g) = g s, s = 1 / (1 + exp(-g)):
//     d_g = d_y u s (1 + g (1 - s)),  d_u = d_y g s
//   rotary embedding, a rotation by the angle of cosine c and sine s: its transpose
//     d_a' = d_a c + d_b s,  d_b' = d_b c - d_a s,  a and b the halves of a head
//     (core/cuda/rope.cu)
//
// Gradients f32, activations of their dtype. CPU references: DoSiluMultiply, DoRope, DoAdd of
// cpu_ops.cc.
//
// Work: grid-stride loops, one element (four of SiluMultiply where alignment allows) or pair per
// thread and step, consecutive threads on consecutive elements. A thread reads an element before it
// writes it and no other thread does, so that d_up may be d_y. Bound by memory.
//
// Versions
//   1  one element per thread and step
//   2  four of SiluMultiply (in use)
#include "core/cuda/kernel_common.cuh"
#include "core/train/backward_kernels.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 256;

// N elements per access, 1 or 4.
template <typename T, int N>
__global__ void SiluBackwardKernel2(const T* gate, const T* up, const float* d_y, int64_t count,
                                    float* d_gate, float* d_up) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count / N;
       i += threads) {
    const Vec<T, N> gates = reinterpret_cast<const Vec<T, N>*>(gate)[i];
    const Vec<T, N> ups = reinterpret_cast<const Vec<T, N>*>(up)[i];
    const Vec<float, N> d = reinterpret_cast<const Vec<float, N>*>(d_y)[i];
    Vec<float, N> gate_gradient, up_gradient;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float g = ToFloat(gates.v[j]);
      const float sigmoid = 1.0f / (1.0f + expf(-g));
      gate_gradient.v[j] = d.v[j] * ToFloat(ups.v[j]) * sigmoid * (1.0f + g * (1.0f - sigmoid));
      up_gradient.v[j] = d.v[j] * g * sigmoid;
    }
    reinterpret_cast<Vec<float, N>*>(d_gate)[i] = gate_gradient;
    reinterpret_cast<Vec<float, N>*>(d_up)[i] = up_gradient;
  }
}

__global__ void RopeBackwardKernel1(const float* cosine, const float* sine, int64_t first_position,
                                    int64_t length, int64_t rows, int64_t heads, int64_t half,
                                    float* d_x) {
  const int64_t total = rows * heads * half;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t index = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; index < total;
       index += threads) {
    const int64_t i = index % half;
    const int64_t row_head = index / half;
    const int64_t position = first_position + row_head / heads % length;
    const float c = cosine[position * half + i];
    const float s = sine[position * half + i];
    float* low = d_x + row_head * 2 * half + i;
    const float a = low[0];
    const float b = low[half];
    low[0] = a * c + b * s;
    low[half] = b * c - a * s;
  }
}

__global__ void AddF32Kernel1(const float* x, int64_t count, float* target) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += threads) {
    target[i] += x[i];
  }
}

}  // namespace

cudaError_t LaunchSiluBackward(const void* gate, const void* up, DType dtype, const float* d_y,
                               int64_t count, float* d_gate, float* d_up, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return DispatchFloat(dtype, [&](auto t) {
    using T = decltype(t);
    const auto* g = static_cast<const T*>(gate);
    const auto* u = static_cast<const T*>(up);
    const bool vectors = count % 4 == 0 && Aligned(g, sizeof(Vec<T, 4>)) &&
                         Aligned(u, sizeof(Vec<T, 4>)) && Aligned(d_y, 16) && Aligned(d_gate, 16) &&
                         Aligned(d_up, 16);
    if (vectors) {
      SiluBackwardKernel2<T, 4>
          <<<GridFor(count / 4, kThreads), kThreads, 0, stream>>>(g, u, d_y, count, d_gate, d_up);
    } else {
      SiluBackwardKernel2<T, 1>
          <<<GridFor(count, kThreads), kThreads, 0, stream>>>(g, u, d_y, count, d_gate, d_up);
    }
    return cudaGetLastError();
  });
}

cudaError_t LaunchRopeBackward(const float* cosine, const float* sine, int64_t first_position,
                               int64_t length, int64_t rows, int64_t heads, int64_t head_dim,
                               float* d_x, cudaStream_t stream) {
  const int64_t half = head_dim / 2;
  if (rows * heads * half == 0) return cudaSuccess;
  RopeBackwardKernel1<<<GridFor(rows * heads * half, kThreads), kThreads, 0, stream>>>(
      cosine, sine, first_position, length, rows, heads, half, d_x);
  return cudaGetLastError();
}

cudaError_t LaunchAddF32(const float* x, int64_t count, float* target, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  AddF32Kernel1<<<GridFor(count, kThreads), kThreads, 0, stream>>>(x, count, target);
  return cudaGetLastError();
}

}  // namespace quantmill::cuda
