// Packed to dense on the GPU. Bound by writing the dense weight.
#include "affine_cuda.h"
#include "affine_device.cuh"
#include "quantmill/sdk/cuda.hpp"

namespace affine {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;  // columns: 16 bytes of a 16-bit result, one word of 4-bit codes

// The codes of eight columns of a row, from `column` on (a multiple of 8), as a bit window. Eight
// fields of 1, 2, 3, 4 or 8 bits that start at a multiple of 8 * bits never touch a third word.
__device__ inline void LoadEight(const DeviceWeight& w, int64_t row, int64_t column,
                                 uint32_t (&codes)[kPerThread]) {
  if (w.tiles != nullptr) return LoadEightOfTiles(w, row, column, codes);
  const int64_t bit = column * w.bits;
  const int32_t* word = w.codes + row * w.words + bit / 32;
  uint64_t window = static_cast<uint32_t>(word[0]);
  if (bit / 32 + 1 < w.words) window |= static_cast<uint64_t>(static_cast<uint32_t>(word[1])) << 32;
  window >>= bit % 32;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    codes[i] = static_cast<uint32_t>(window) & ((1u << w.bits) - 1u);
    window >>= w.bits;
  }
}

// out: [out, in]. One thread per eight columns of a row.
template <class T>
__global__ void __launch_bounds__(kThreads) DequantizeKernel(DeviceWeight w, T* out) {
  const int64_t per_row = (w.in + kPerThread - 1) / kPerThread;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= per_row * w.out) return;
  const int64_t row = index / per_row;
  const int64_t begin = index % per_row * kPerThread;
  uint32_t codes[kPerThread];
  LoadEight(w, row, begin, codes);
  const bool one_group = w.axis == 1 && w.group_index == nullptr && w.group_size % kPerThread == 0;
  ScaleZero sz = LoadScaleZeroAtPlace(w, ScalePlace(w, row, begin));
  alignas(16) T values[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t column = begin + i;
    if (!one_group && column < w.in) sz = LoadScaleZeroAtPlace(w, ScalePlace(w, row, column));
    values[i] = FromFloat<T>(sz.scale * (static_cast<float>(codes[i]) - sz.zero));
  }
  T* target = out + row * w.in;
  if (w.permutation == nullptr && w.in % kPerThread == 0) {
    constexpr int kVectors = kPerThread * static_cast<int>(sizeof(T)) / 16;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      reinterpret_cast<uint4*>(target + begin)[v] = reinterpret_cast<const uint4*>(values)[v];
    }
    return;
  }
  for (int i = 0; i < kPerThread && begin + i < w.in; ++i) {
    const int64_t column = begin + i;
    target[w.permutation != nullptr ? w.permutation[column] : column] = values[i];
  }
}

template <class T>
qm_status Launch(qm_call* call, const Weight& weight, qm_tensor* out) {
  const DeviceWeight w = ToDeviceWeight(weight);
  const int64_t threads = (w.in + kPerThread - 1) / kPerThread * w.out;
  const unsigned blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  DequantizeKernel<T><<<blocks, kThreads, 0, qm::Stream(call)>>>(w, static_cast<T*>(out->data));
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

}  // namespace

qm_status CudaDequantize(qm_call* call, const Weight& weight, qm_tensor* out) {
  if (out->dtype == QM_F32) return Launch<float>(call, weight, out);
  if (out->dtype == QM_F16) return Launch<__half>(call, weight, out);
  return Launch<__nv_bfloat16>(call, weight, out);
}

}  // namespace affine
