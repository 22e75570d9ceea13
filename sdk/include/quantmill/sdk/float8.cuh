// QuantizeFloat8Cpu of float8.hpp on a GPU, bit for bit (compile with --fmad=false). Include in one
// CUDA file of a plugin.
//
// Work is split so:
//   float8_extremes_kernel1   a block per row: its largest magnitude, and that of the tensor
//   float8_encode_kernel1     a block per row: scale, codes
// Assumed: rows of the weight are contiguous. The largest magnitude is kept as the bits of a
// non-negative float, which order as the floats do, so that its maximum needs no order of threads.
#ifndef QUANTMILL_SDK_FLOAT8_CUH_
#define QUANTMILL_SDK_FLOAT8_CUH_

#include "quantmill/sdk/cuda.hpp"
#include "quantmill/sdk/float8.hpp"

namespace qm {

// Threads of a block of these kernels.
inline constexpr int kFloat8Threads = 256;

// Maximum over the threads of a block of kFloat8Threads; the result is that of thread 0. Every
// thread of the block calls it.
__device__ inline uint32_t BlockMaximum(uint32_t value) {
  __shared__ uint32_t warps[kFloat8Threads / 32];
  for (int half = 16; half > 0; half /= 2) {
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, value, half);
    value = other > value ? other : value;
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kFloat8Threads / 32; ++w) value = warps[w] > value ? warps[w] : value;
  }
  return value;
}

// row: n weights. The bits of the largest magnitude (of thread 0), NaN and infinities passed over;
// *bad becomes the least of itself and first + the column of a weight that is not finite.
__device__ inline uint32_t RowMagnitudeBits(const float* row, int64_t n, int64_t first,
                                            unsigned long long* bad) {
  uint32_t largest = 0;
  for (int64_t i = threadIdx.x; i < n; i += kFloat8Threads) {
    const uint32_t magnitude = FloatBits(row[i]) & 0x7FFFFFFFu;
    if (magnitude >= 0x7F800000u) {
      atomicMin(bad, static_cast<unsigned long long>(first + i));
    } else if (magnitude > largest) {
      largest = magnitude;
    }
  }
  return BlockMaximum(largest);
}

// weight: [out, in] with row stride; largest: [out + 1], the last that of the whole tensor; bad:
// least index of a weight that is not finite.
__global__ static void __launch_bounds__(kFloat8Threads)
    float8_extremes_kernel1(const float* __restrict__ weight, int64_t row_stride,
                            int64_t out_features, int64_t in_features, uint32_t* largest,
                            unsigned long long* bad) {
  const int64_t row = blockIdx.x;
  const uint32_t magnitude =
      RowMagnitudeBits(weight + row * row_stride, in_features, row * in_features, bad);
  if (threadIdx.x != 0) return;
  largest[row] = magnitude;
  atomicMax(&largest[out_features], magnitude);
}

// largest: as above; codes: [out, in]; scale: [out] or [1].
__global__ static void __launch_bounds__(kFloat8Threads)
    float8_encode_kernel1(const float* __restrict__ weight, int64_t row_stride,
                          int64_t out_features, int64_t in_features, bool per_tensor,
                          qm_dtype code_dtype, qm_dtype scale_dtype, const uint32_t* largest,
                          uint8_t* __restrict__ codes, void* __restrict__ scale) {
  const int64_t row = blockIdx.x;
  const float s =
      Float8Scale(FloatFromBits(largest[per_tensor ? out_features : row]), code_dtype, scale_dtype);
  if (threadIdx.x == 0 && (row == 0 || !per_tensor)) StoreScale(scale, scale_dtype, row, s);
  for (int64_t i = threadIdx.x; i < in_features; i += kFloat8Threads) {
    codes[row * in_features + i] = EncodeFloat8(weight[row * row_stride + i], s, code_dtype);
  }
}

// Device scratch of QuantizeFloat8Cuda.
inline uint64_t Float8ScratchBytes(const Row8Layout& layout) {
  return static_cast<uint64_t>(layout.out_features + 1) * sizeof(uint32_t) +
         sizeof(unsigned long long);
}

// Waits for the check of the weights; INVALID_ARGUMENT names the first that is not finite.
inline qm_status FinishFiniteCheck(qm_call* call, const unsigned long long* bad,
                                   int64_t in_features) {
  unsigned long long first_bad = 0;
  const cudaStream_t stream = Stream(call);
  QM_CUDA(call, cudaMemcpyAsync(&first_bad, bad, sizeof first_bad, cudaMemcpyDeviceToHost, stream));
  QM_CUDA(call, cudaStreamSynchronize(stream));
  if (first_bad == ~0ull) return QM_OK;
  const int64_t index = static_cast<int64_t>(first_bad);
  return NotFinite(call, index / in_features, index % in_features);
}

// Fills codes and scale of `out` from a weight on the call's GPU.
inline qm_status QuantizeFloat8Cuda(qm_call* call, const Row8Layout& layout,
                                    TensorView<const float> weight, const Row8Tensors& out) {
  const cudaStream_t stream = Stream(call);
  const int64_t rows = layout.out_features, columns = layout.in_features;
  const unsigned blocks = static_cast<unsigned>(rows);
  uint32_t* largest = nullptr;
  unsigned long long* bad = nullptr;
  QM_TRY(Progress(call, 0.0));
  QM_TRY(Scratch(call, call->device, rows + 1, "magnitudes of the rows", &largest));
  QM_TRY(Scratch(call, call->device, 1, "the finiteness check", &bad));
  QM_CUDA(call, cudaMemsetAsync(bad, 0xFF, sizeof *bad, stream));
  QM_CUDA(call, cudaMemsetAsync(largest + rows, 0, sizeof *largest, stream));
  float8_extremes_kernel1<<<blocks, kFloat8Threads, 0, stream>>>(weight.data(), weight.stride(0),
                                                                 rows, columns, largest, bad);
  QM_CUDA(call, cudaGetLastError());
  float8_encode_kernel1<<<blocks, kFloat8Threads, 0, stream>>>(
      weight.data(), weight.stride(0), rows, columns, layout.scales == 1 && rows > 1,
      layout.code_dtype, layout.scale_dtype, largest, static_cast<uint8_t*>(out.codes.data),
      out.scale.data);
  QM_CUDA(call, cudaGetLastError());
  return FinishFiniteCheck(call, bad, columns);
}

}  // namespace qm

#endif  // QUANTMILL_SDK_FLOAT8_CUH_
