// Fake quantization of a weight, its derivatives, and the packing after training, on the GPU. The
// weights of forward, the gradient of the weight and the packed codes have the bits of qat_ref.cc
// (compiled with --fmad=false); gradients of parameters are sums in another, fixed order.
//
//   forward_kernel1   weight f32 [out, in] -> w_eff f32, f16 or bf16 [out, in]
//   vjp_kernel1       weight, d w_eff f32 [out, in] -> += d weight [out, in], d factor, d zero
//   [out, groups] encode_kernel1    weight -> codes [out, words]; one thread per 32-bit word
//   grid_kernel1      parameters -> scale, zero [out, groups]; one thread per group
//
// Forward and vjp read and write each value once. Groups follow one another in memory, so a group
// is a piece of `width` values from index * width; kLanes threads share it: 4 to 32 of a warp, or a
// block of 256 for wide groups. A thread takes kVector = 4 neighbours (1 where groups or addresses
// do not allow 16 bytes at a time) and keeps two such loads in flight. Sums: per thread in
// ascending order, by butterfly in a warp, then over the warps of the block in order; no atomics.
// Assumed: contiguous matrices, fewer than 2^31 values in a group.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "qat.h"
#include "quantmill/sdk/cuda.hpp"

namespace quantmill::qat {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockLanes = kThreads;  // a whole block per group
constexpr int kDepth = 2;              // loads in flight
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr unsigned long long kNone = ~0ull;

template <int kVector>
struct Values {
  float at[kVector];
};

template <int kVector>
__device__ Values<kVector> Load(const float* from) {
  Values<kVector> out;
  if constexpr (kVector == 4) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    out.at[0] = v.x, out.at[1] = v.y, out.at[2] = v.z, out.at[3] = v.w;
  } else {
    out.at[0] = *from;
  }
  return out;
}

template <int kVector>
__device__ void Store(const Values<kVector>& v, float* to) {
  if constexpr (kVector == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(v.at[0], v.at[1], v.at[2], v.at[3]);
  } else {
    *to = v.at[0];
  }
}

// One conversion instruction for two; for finite values the bits of qm::ToF16 and qm::ToBF16.
__device__ uint32_t Pair(float low, float high, qm::F16) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
__device__ uint32_t Pair(float low, float high, qm::BF16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

template <int kVector, class Half>
__device__ void Store(const Values<kVector>& v, Half* to) {
  if constexpr (kVector == 4) {
    *reinterpret_cast<uint2*>(to) =
        make_uint2(Pair(v.at[0], v.at[1], Half()), Pair(v.at[2], v.at[3], Half()));
  } else {
    to->bits = static_cast<uint16_t>(Pair(v.at[0], 0.0f, Half()));
  }
}

// The group of a thread and its place in it.
struct Place {
  int64_t index;  // of the group
  int lane;       // 0 .. kLanes - 1
  bool active;    // the group exists
};

template <int kLanes>
__device__ Place PlaceOf(int64_t groups) {
  const int64_t index =
      static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  return {index, static_cast<int>(threadIdx.x % kLanes), index < groups};
}

template <int kLanes, int kVector, class Out>
__global__ void __launch_bounds__(kThreads)
    forward_kernel1(const float* __restrict__ weight, Parameters params, qm::AffineRule rule,
                    int64_t groups, int width, Out* __restrict__ out) {
  const Place place = PlaceOf<kLanes>(groups);
  if (!place.active) return;
  const qm::AffineGroup grid = GridOf(params, rule, place.index);
  const float max_code = rule.max_code();
  const float* w = weight + place.index * width;
  Out* y = out + place.index * width;
  constexpr int kStep = kLanes * kVector;
  for (int begin = place.lane * kVector; begin < width; begin += kDepth * kStep) {
    Values<kVector> x[kDepth];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (begin + d * kStep < width) x[d] = Load<kVector>(w + begin + d * kStep);
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (begin + d * kStep >= width) continue;
#pragma unroll
      for (int k = 0; k < kVector; ++k) x[d].at[k] = FakeQuantize(x[d].at[k], grid, max_code);
      Store(x[d], y + begin + d * kStep);
    }
  }
}

// The sum over the kLanes threads of a group, in lane 0. Every thread of the block calls it.
template <int kLanes>
__device__ float SumOfLanes(float sum, float* shared) {
  constexpr int kWarpLanes = kLanes < 32 ? kLanes : 32;
#pragma unroll
  for (int half = kWarpLanes / 2; half > 0; half /= 2) sum += __shfl_xor_sync(kAllLanes, sum, half);
  if constexpr (kLanes > 32) {
    static_assert(kLanes == kThreads);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      sum = shared[0];
      for (int warp = 1; warp < kThreads / 32; ++warp) sum += shared[warp];
    }
  }
  return sum;
}

template <int kLanes, int kVector>
__global__ void __launch_bounds__(kThreads)
    vjp_kernel1(const float* __restrict__ weight, Parameters params, qm::AffineRule rule,
                int64_t groups, int width, const float* __restrict__ d_out, Gradients out) {
  __shared__ float shared[2][kThreads / 32];
  const Place place = PlaceOf<kLanes>(groups);
  const float max_code = rule.max_code();
  const int64_t index = place.active ? place.index : 0;
  const qm::AffineGroup grid = GridOf(params, rule, index);
  const float* w = weight + index * width;
  const float* g = d_out + index * width;
  float* d_weight = out.weight == nullptr ? nullptr : out.weight + index * width;
  float scale = 0.0f, clipped = 0.0f;
  constexpr int kStep = kLanes * kVector;
  const int end = place.active ? width : 0;
  for (int begin = place.lane * kVector; begin < end; begin += kDepth * kStep) {
    Values<kVector> x[kDepth], above[kDepth], sum[kDepth];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int at = begin + d * kStep;
      if (at >= end) continue;
      x[d] = Load<kVector>(w + at);
      above[d] = Load<kVector>(g + at);
      if (d_weight != nullptr) sum[d] = Load<kVector>(d_weight + at);
    }
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int at = begin + d * kStep;
      if (at >= end) continue;
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        const Derivative one = Differentiate(x[d].at[k], above[d].at[k], grid, max_code);
        scale += one.scale;
        clipped += one.clipped;
        sum[d].at[k] += one.weight;
      }
      if (d_weight != nullptr) Store(sum[d], d_weight + at);
    }
  }
  scale = SumOfLanes<kLanes>(scale, shared[0]);
  clipped = SumOfLanes<kLanes>(clipped, shared[1]);
  if (place.lane != 0 || !place.active) return;
  if (out.factor != nullptr) out.factor[index] += params.scale_init[index] * scale;
  if (out.zero != nullptr) out.zero[index] -= grid.scale * clipped;
}

// bad: least index of a weight that is not finite.
__global__ void __launch_bounds__(kThreads)
    encode_kernel1(const float* __restrict__ weight, int64_t row_stride, Parameters params,
                   qm::AffineShape shape, int64_t words, int32_t* __restrict__ packed,
                   unsigned long long* bad) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= shape.out_features * words) return;
  const int64_t row = item / words;
  const int32_t bits = shape.rule.bits;
  const int64_t width = shape.group_width(), first_bit = item % words * 32;
  const float* w = weight + row * row_stride;
  uint32_t word = 0;
  for (int64_t i = first_bit / bits; i < shape.in_features && i * bits < first_bit + 32; ++i) {
    const qm::AffineGroup grid = GridOf(params, shape.rule, row * shape.groups() + i / width);
    if (!isfinite(w[i])) {
      atomicMin(bad, static_cast<unsigned long long>(row * shape.in_features + i));
    }
    const uint32_t code =
        static_cast<uint32_t>(qm::EncodeAffine(w[i], grid, shape.rule.max_code()));
    const int64_t shift = i * bits - first_bit;  // negative for a code begun in the word before
    word |= shift >= 0 ? code << shift : code >> -shift;
  }
  packed[item] = static_cast<int32_t>(word);
}

// bad: least index of a group whose parameters are not finite.
__global__ void __launch_bounds__(kThreads)
    grid_kernel1(Parameters params, qm::AffineRule rule, int64_t groups, void* __restrict__ scale,
                 uint8_t* __restrict__ zero, unsigned long long* bad) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= groups) return;
  if (!isfinite(params.factor[index]) || !isfinite(params.scale_init[index]) ||
      (params.zero != nullptr && !isfinite(params.zero[index]))) {
    atomicMin(bad, static_cast<unsigned long long>(index));
  }
  const qm::AffineGroup grid = GridOf(params, rule, index);
  qm::StoreScale(scale, rule.scale_dtype, index, grid.scale);
  if (zero != nullptr) zero[index] = static_cast<uint8_t>(grid.zero);
}

unsigned Blocks(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

bool Aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// launch(lanes, vector) with both as constants: two loads of each thread cover groups of up to
// 2 * 32 * vector; wider ones than 1024 get a block.
template <int kVector, class Launch>
void ChooseLanes(int64_t width, Launch&& launch) {
  constexpr std::integral_constant<int, kVector> vector;
  const int64_t loads = (width + kVector - 1) / kVector;
  if (width > 1024) {
    launch(std::integral_constant<int, kBlockLanes>(), vector);
  } else if (loads > 32) {
    launch(std::integral_constant<int, 32>(), vector);
  } else if (loads > 16) {
    launch(std::integral_constant<int, 16>(), vector);
  } else if (loads > 8) {
    launch(std::integral_constant<int, 8>(), vector);
  } else {
    launch(std::integral_constant<int, 4>(), vector);
  }
}

template <class Launch>
void Choose(int64_t width, bool aligned, Launch&& launch) {
  if (aligned && width % 4 == 0) {
    ChooseLanes<4>(width, launch);
  } else {
    ChooseLanes<1>(width, launch);
  }
}

template <class Out>
qm_status ForwardLaunch(qm_call* call, const qm::AffineShape& shape, const float* weight,
                        const Parameters& params, Out* out) {
  const int64_t width = shape.group_width(), groups = shape.out_features * shape.groups();
  const bool aligned = Aligned(weight, 16) && Aligned(out, 4 * sizeof(Out));
  Choose(width, aligned, [&](auto lanes, auto vector) {
    forward_kernel1<lanes(), vector(), Out>
        <<<Blocks(groups * lanes()), kThreads, 0, qm::Stream(call)>>>(
            weight, params, shape.rule, groups, static_cast<int>(width), out);
  });
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

}  // namespace

qm_status ForwardCuda(qm_call* call, const qm::AffineShape& shape, const float* weight,
                      const Parameters& params, qm_dtype out_dtype, void* out) {
  if (out_dtype == QM_F16) {
    return ForwardLaunch(call, shape, weight, params, static_cast<qm::F16*>(out));
  }
  if (out_dtype == QM_BF16) {
    return ForwardLaunch(call, shape, weight, params, static_cast<qm::BF16*>(out));
  }
  return ForwardLaunch(call, shape, weight, params, static_cast<float*>(out));
}

qm_status VjpCuda(qm_call* call, const qm::AffineShape& shape, const float* weight,
                  const Parameters& params, const float* d_out, const Gradients& out) {
  const int64_t width = shape.group_width(), groups = shape.out_features * shape.groups();
  const bool aligned = Aligned(weight, 16) && Aligned(d_out, 16) && Aligned(out.weight, 16);
  Choose(width, aligned, [&](auto lanes, auto vector) {
    vjp_kernel1<lanes(), vector()><<<Blocks(groups * lanes()), kThreads, 0, qm::Stream(call)>>>(
        weight, params, shape.rule, groups, static_cast<int>(width), d_out, out);
  });
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

qm_status FinalizeCuda(qm_call* call, const qm::AffineShape& shape,
                       qm::TensorView<const float> weight, const Parameters& params,
                       const qm::AffineTensors& out) {
  const cudaStream_t stream = qm::Stream(call);
  const int64_t words = qm::AffineWordsPerRow(shape.in_features, shape.rule.bits);
  const int64_t groups = shape.out_features * shape.groups();
  unsigned long long* bad = nullptr;  // a weight, a group
  QM_TRY(qm::Scratch(call, call->device, 2, "the finiteness check", &bad));
  QM_CUDA(call, cudaMemsetAsync(bad, 0xFF, 2 * sizeof *bad, stream));
  grid_kernel1<<<Blocks(groups), kThreads, 0, stream>>>(
      params, shape.rule, groups, out.scale.data, static_cast<uint8_t*>(out.zero.data), bad + 1);
  QM_CUDA(call, cudaGetLastError());
  encode_kernel1<<<Blocks(shape.out_features * words), kThreads, 0, stream>>>(
      weight.data(), weight.stride(0), params, shape, words, static_cast<int32_t*>(out.codes.data),
      bad);
  QM_CUDA(call, cudaGetLastError());
  unsigned long long seen[2] = {kNone, kNone};
  QM_CUDA(call, cudaMemcpyAsync(seen, bad, sizeof seen, cudaMemcpyDeviceToHost, stream));
  QM_CUDA(call, cudaStreamSynchronize(stream));
  const int64_t index = static_cast<int64_t>(seen[0]), group = static_cast<int64_t>(seen[1]);
  if (seen[0] != kNone) {
    return Diverged(call, "weight", index / shape.in_features, index % shape.in_features);
  }
  if (seen[1] == kNone) return QM_OK;
  return Diverged(call, "scale or zero point", group / shape.groups(), group % shape.groups());
}

}  // namespace quantmill::qat
