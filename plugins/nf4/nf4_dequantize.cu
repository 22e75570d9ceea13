// Packed to dense on the GPU: w[i] = codebook[code[i]] * absmax[i / B] over the flat order, in f32,
// rounded once. CpuDequantize in nf4_cpu.cc is the same on the CPU.
//
// The codes and factor are those of the format's layout or of tiles (nf4_tiles.h).
//
// A thread takes eight neighbouring weights: four bytes of codes, one factor (B is a multiple of
// 8), one or two 16-byte stores. Bound by writing the dense weight. Assumptions (checked): bases
// are 16-byte aligned; the last, short piece is written one by one. Versions: 1 as described.
#include "nf4_device.cuh"
#include "nf4_math.h"
#include "quantmill/sdk/cuda.hpp"

namespace quantmill::nf4 {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;

// Codes of weights begin ... begin+7 of a row and their factor. kTiles: of a prepacked weight.
template <bool kTiles>
__device__ inline uint32_t LoadEightCodes(const DeviceWeight& w, int64_t begin, float* absmax) {
  if constexpr (kTiles) {
    const int64_t row = begin / w.in, column = begin % w.in;
    *absmax = LoadTileAbsmax(w, row, column);
    return LoadTileWord(w, row, column);
  }
  *absmax = LoadAbsmax(w, begin >> w.block_shift);
  return *reinterpret_cast<const uint32_t*>(w.codes + begin / 2);
}

// out: [count]. With tiles count is a multiple of kPerThread.
template <class T, bool kTiles>
__global__ void __launch_bounds__(kThreads)
    nf4_dequantize_kernel1(DeviceWeight w, int64_t count, T* out) {
  __shared__ float codebook[kCodebookSize];
  if (threadIdx.x < kCodebookSize) codebook[threadIdx.x] = w.codebook[threadIdx.x];
  __syncthreads();
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPerThread;
  if (begin >= count) return;
  if (!kTiles && begin + kPerThread > count) {
    const float absmax = LoadAbsmax(w, begin >> w.block_shift);
    for (int64_t i = begin; i < count; ++i) {
      out[i] = FromFloat<T>(__fmul_rn(codebook[LoadCode(w, i)], absmax));
    }
    return;
  }
  float absmax;
  const uint32_t word = LoadEightCodes<kTiles>(w, begin, &absmax);
  alignas(16) T values[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    // Even weights are in the high half of byte i / 2.
    const uint32_t code = (word >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0))) & 15u;
    values[i] = FromFloat<T>(__fmul_rn(codebook[code], absmax));
  }
  constexpr int kVectors = kPerThread * static_cast<int>(sizeof(T)) / 16;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    reinterpret_cast<uint4*>(out + begin)[v] = reinterpret_cast<const uint4*>(values)[v];
  }
}

template <class T>
qm_status Launch(qm_call* call, const Weight& weight, qm_tensor* out) {
  if (reinterpret_cast<uintptr_t>(out->data) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(weight.codes) % 4 != 0) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "tensors must be aligned to 16 bytes");
  }
  const int64_t count = weight.weights();
  const int64_t threads = (count + kPerThread - 1) / kPerThread;
  const unsigned blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  const auto kernel =
      weight.tiles != nullptr ? nf4_dequantize_kernel1<T, true> : nf4_dequantize_kernel1<T, false>;
  kernel<<<blocks, kThreads, 0, qm::Stream(call)>>>(ToDeviceWeight(weight), count,
                                                    static_cast<T*>(out->data));
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

}  // namespace

qm_status CudaDequantize(qm_call* call, const Weight& weight, qm_tensor* out) {
  if (out->dtype == QM_F32) return Launch<float>(call, weight, out);
  if (out->dtype == QM_F16) return Launch<__half>(call, weight, out);
  return Launch<__nv_bfloat16>(call, weight, out);
}

}  // namespace quantmill::nf4
