// Packed to dense on the GPU: w = scale * value(code) in f32, rounded once. Bound by writing the
// dense weight. CPU: row8_cpu.cc.
#include "quantmill/sdk/cuda.hpp"
#include "row8_device.cuh"

namespace eetq {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;  // columns: 8 bytes of codes, 16 bytes of a 16-bit result

__device__ inline float Narrow(float value, float) { return value; }
__device__ inline __half Narrow(float value, __half) { return __float2half_rn(value); }
__device__ inline __nv_bfloat16 Narrow(float value, __nv_bfloat16) {
  return __float2bfloat16_rn(value);
}

// out: [p.out, p.in]. A thread per eight columns of a row.
template <Code kCode, class T>
__global__ void __launch_bounds__(kThreads) row8_dequantize_kernel1(DeviceProduct p, T* out) {
  const int64_t per_row = (p.in + kPerThread - 1) / kPerThread;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= per_row * p.out) return;
  const int64_t row = index / per_row;
  const int64_t at = row * p.in + index % per_row * kPerThread;
  const float scale = ScaleOf(p, row);
  if (p.in % kPerThread != 0) {
    const int64_t end = min(at + kPerThread, (row + 1) * p.in);
    for (int64_t i = at; i < end; ++i) {
      out[i] = Narrow(scale * ValueOf<kCode>(p.codes[i]), T{});
    }
    return;
  }
  const uint2 codes = *reinterpret_cast<const uint2*>(p.codes + at);
  alignas(16) T values[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const uint32_t word = i < 4 ? codes.x : codes.y;
    values[i] = Narrow(scale * ValueOf<kCode>(static_cast<uint8_t>(word >> (i % 4 * 8))), T{});
  }
  constexpr int kVectors = kPerThread * static_cast<int>(sizeof(T)) / 16;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    reinterpret_cast<uint4*>(out + at)[v] = reinterpret_cast<const uint4*>(values)[v];
  }
}

template <Code kCode, class T>
qm_status Launch(qm_call* call, const DeviceProduct& p, T* out) {
  const int64_t threads = (p.in + kPerThread - 1) / kPerThread * p.out;
  const unsigned blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  row8_dequantize_kernel1<kCode, T><<<blocks, kThreads, 0, qm::Stream(call)>>>(p, out);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

template <Code kCode>
qm_status LaunchTo(qm_call* call, const DeviceProduct& p, qm_tensor* out) {
  if (out->dtype == QM_F32) return Launch<kCode>(call, p, static_cast<float*>(out->data));
  if (out->dtype == QM_F16) return Launch<kCode>(call, p, static_cast<__half*>(out->data));
  return Launch<kCode>(call, p, static_cast<__nv_bfloat16*>(out->data));
}

}  // namespace

qm_status CudaDequantize(qm_call* call, const Weight& w, qm_tensor* out) {
  DeviceProduct p = {};
  p.codes = w.codes;
  p.scale = w.scale;
  p.scale_dtype = w.scale_dtype;
  p.per_tensor = w.params.per_tensor;
  p.out = w.out;
  p.in = w.in;
  if (w.params.code == Code::kInt8) return LaunchTo<Code::kInt8>(call, p, out);
  if (w.params.code == Code::kE4M3) return LaunchTo<Code::kE4M3>(call, p, out);
  return LaunchTo<Code::kE5M2>(call, p, out);
}

}  // namespace eetq
