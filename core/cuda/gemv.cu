// Linear for a few rows (decoding): every weight is read once, so this is bound by reading them.
//
//   out[r, j] = sum_i x[r, i] * weight[j, i] + bias[j]
//
// x: [rows, k], weight: [n, k], out: [rows, n]; rows <= 4. Products and sums in f32.
//
// Work: a warp makes kOutputs neighbouring outputs j for all rows. Per step a lane reads 8 elements
// of each of the kOutputs weight rows (one or two 16-byte loads, marked read-once so that x stays
// in L1) and of each x row, and two steps are in flight at a time. Lanes are added by shuffles at
// the end, in a fixed order.
// Assumed: 16-byte aligned x and weight, k % 8 == 0 (GemvSuits).
//
// Versions
//   1  one output per warp, one step in flight
//   2  two outputs per warp, two steps in flight (in use). H100 80GB HBM3, 2026-11-22, BF16, one
//      row: 2480 GB/s at 4096 x 6144, 2930 at 4096 x 28672, 2490 at 14336 x 4096.
#include "core/cuda/gemv.cuh"
#include "core/cuda/kernel_common.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kOutputs = 2;
constexpr int kStep = 8;  // elements per lane and step

// A 16-byte read of data used once by the whole grid.
__device__ __forceinline__ uint4 LoadOnce(const void* pointer) {
  return __ldcs(static_cast<const uint4*>(pointer));
}

template <typename T, bool kOnce>
__device__ __forceinline__ void LoadStep(const T* source, float (&out)[kStep]) {
  constexpr int kLoads = kStep * static_cast<int>(sizeof(T)) / 16;
  constexpr int kPerLoad = kVec16<T>;
#pragma unroll
  for (int l = 0; l < kLoads; ++l) {
    const T* place = source + l * kPerLoad;
    const uint4 bits = kOnce ? LoadOnce(place) : __ldg(reinterpret_cast<const uint4*>(place));
    const T* values = reinterpret_cast<const T*>(&bits);
#pragma unroll
    for (int i = 0; i < kPerLoad; ++i) out[l * kPerLoad + i] = ToFloat(values[i]);
  }
}

__device__ __forceinline__ void Store(void* out, DType dtype, int64_t index, float value) {
  if (dtype == DType::kF32) {
    static_cast<float*>(out)[index] = value;
  } else if (dtype == DType::kF16) {
    static_cast<__half*>(out)[index] = FromFloat<__half>(value);
  } else {
    static_cast<__nv_bfloat16*>(out)[index] = FromFloat<__nv_bfloat16>(value);
  }
}

template <typename X, typename W, int kRows>
__global__ void __launch_bounds__(kThreads) GemvKernel2(GemvArguments a) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp =
      blockIdx.x * static_cast<int64_t>(kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  const int64_t first = warp * kOutputs;
  if (first >= a.n) return;
  const X* x = static_cast<const X*>(a.x);
  const W* rows[kOutputs];
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    // Past the last output the last row is read again and its sum dropped.
    rows[o] = static_cast<const W*>(a.weight) + min(first + o, a.n - 1) * a.k;
  }
  float sums[kOutputs][kRows] = {};
#pragma unroll 2
  for (int64_t i = lane * kStep; i < a.k; i += kWarpSize * kStep) {
    float w[kOutputs][kStep];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) LoadStep<W, true>(rows[o] + i, w[o]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float in[kStep];
      LoadStep<X, false>(x + r * a.k + i, in);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
        for (int s = 0; s < kStep; ++s) sums[o][r] += in[s] * w[o][s];
      }
    }
  }
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum = WarpSum(sums[o][r]);
      if (lane != 0 || first + o >= a.n) continue;
      if (a.bias != nullptr) {
        float bias[1];
        LoadAs(a.bias, a.bias_dtype, first + o, bias);
        sum += bias[0];
      }
      Store(a.out, a.out_dtype, r * a.n + first + o, sum);
    }
  }
}

template <typename X, typename W>
cudaError_t LaunchForRows(const GemvArguments& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(CeilDiv(a.n, kOutputs * (kThreads / kWarpSize)));
  switch (a.rows) {
    case 1:
      GemvKernel2<X, W, 1><<<blocks, kThreads, 0, stream>>>(a);
      break;
    case 2:
      GemvKernel2<X, W, 2><<<blocks, kThreads, 0, stream>>>(a);
      break;
    case 3:
      GemvKernel2<X, W, 3><<<blocks, kThreads, 0, stream>>>(a);
      break;
    case 4:
      GemvKernel2<X, W, 4><<<blocks, kThreads, 0, stream>>>(a);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace

bool GemvSuits(const GemvArguments& a) {
  return a.rows >= 1 && a.rows <= kGemvRows && a.n >= 1 && a.k >= kStep && a.k % kStep == 0 &&
         Aligned(a.x, 16) && Aligned(a.weight, 16);
}

cudaError_t LaunchGemv(const GemvArguments& a, cudaStream_t stream) {
  if (!GemvSuits(a)) return cudaErrorInvalidValue;
  return DispatchFloat(a.x_dtype, [&](auto x) {
    return DispatchFloat(
        a.weight_dtype, [&](auto w) { return LaunchForRows<decltype(x), decltype(w)>(a, stream); });
  });
}

}  // namespace quantmill::cuda
