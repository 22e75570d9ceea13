// Activations rounded to 8 bits, row by row (FORMATS.md; CPU: QuantizeRow of row8_cpu.cc, the same
// bits; compiled with --fmad=false).
//
//   m = largest |x| of the row, scale = m / 127.5 (int8) or m / 448 (E4M3), 1 where that is 0
//   int8: round half even of clamp(x / scale, -128, 127); else the nearest E4M3, kept as F16
//
// A block per row: once for the largest value, once for the codes. A row is short enough to come
// from a cache the second time.
#include "quantmill/sdk/cuda.hpp"
#include "row8_cuda.h"

namespace eetq {
namespace {

constexpr int kThreads = 256;

// The largest of the threads' values, for every thread. Bits of non-negative floats order as the
// floats do, infinity and NaN above all others.
__device__ inline uint32_t BlockLargest(uint32_t value) {
  __shared__ uint32_t shared[kThreads / 32];
  for (int half = 16; half > 0; half /= 2) {
    value = max(value, __shfl_xor_sync(0xFFFFFFFFu, value, half));
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  for (int w = 0; w < kThreads / 32; ++w) value = max(value, shared[w]);
  return value;
}

__device__ inline void Round(float quotient, int8_t* out) {
  const float clamped = fminf(fmaxf(quotient, -128.0f), 127.0f);
  *out = static_cast<int8_t>(__float2int_rn(clamped));
}
__device__ inline void Round(float quotient, __half* out) {
  *out = __float2half_rn(qm::FromE4M3(qm::ToE4M3(quotient)));  // exact
}

// x: [rows, in] of `dtype`; rounded: [rows, in]; scale: [rows]. A block per row.
template <class Q>
__global__ void __launch_bounds__(kThreads)
    row8_activations_kernel1(const void* __restrict__ x, qm_dtype dtype, int64_t in, float limit,
                             Q* __restrict__ rounded, float* __restrict__ scale) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * in;
  uint32_t largest = 0;
  for (int64_t i = threadIdx.x; i < in; i += kThreads) {
    largest = max(largest, qm::FloatBits(LoadNumber(x, dtype, first + i)) & 0x7FFFFFFFu);
  }
  largest = BlockLargest(largest);
  const bool finite = largest < 0x7F800000u;
  float s = qm::FloatFromBits(largest) / limit;
  if (s == 0.0f) s = 1.0f;
  if (threadIdx.x == 0) scale[blockIdx.x] = finite ? s : qm::FloatFromBits(0x7FC00000u);
  for (int64_t i = threadIdx.x; i < in; i += kThreads) {
    Round(finite ? LoadNumber(x, dtype, first + i) / s : 0.0f, rounded + first + i);
  }
}

}  // namespace

qm_status QuantizeActivations(qm_call* call, Code code, const qm_tensor& x, void* rounded,
                              float* scale) {
  const unsigned rows = static_cast<unsigned>(x.shape[0]);
  const int64_t in = x.shape[1];
  if (code == Code::kInt8) {
    row8_activations_kernel1<<<rows, kThreads, 0, qm::Stream(call)>>>(
        x.data, x.dtype, in, 127.5f, static_cast<int8_t*>(rounded), scale);
  } else {
    row8_activations_kernel1<<<rows, kThreads, 0, qm::Stream(call)>>>(
        x.data, x.dtype, in, 448.0f, static_cast<__half*>(rounded), scale);
  }
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

}  // namespace eetq
