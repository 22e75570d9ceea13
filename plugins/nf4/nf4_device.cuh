// Small device functions shared by the kernels.
#ifndef QUANTMILL_PLUGINS_NF4_NF4_DEVICE_CUH_
#define QUANTMILL_PLUGINS_NF4_NF4_DEVICE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "nf4_cuda.h"
#include "nf4_tiles.h"

namespace quantmill::nf4 {

// Factor of a block from its byte; widened as on the CPU, without contraction. Fewer than 2^32
// blocks.
__device__ inline float WidenAbsmax(const DeviceWeight& w, int64_t block, uint32_t byte) {
  const uint32_t range = static_cast<uint32_t>(block) / static_cast<uint32_t>(w.nested_block_size);
  return __fadd_rn(__fmul_rn(__ldg(w.nested_codebook + byte), __ldg(w.nested_absmax + range)),
                   __ldg(w.absmax_offset));
}
__device__ inline float LoadNestedAbsmax(const DeviceWeight& w, int64_t block) {
  return WidenAbsmax(w, block, __ldg(w.absmax_byte + block));
}
template <bool kNested>
__device__ inline float LoadAbsmaxOf(const DeviceWeight& w, int64_t block) {
  if constexpr (kNested) return LoadNestedAbsmax(w, block);
  return __ldg(w.absmax + block);
}
__device__ inline float LoadAbsmax(const DeviceWeight& w, int64_t block) {
  return w.absmax != nullptr ? __ldg(w.absmax + block) : LoadNestedAbsmax(w, block);
}

// Of a prepacked weight: eight codes from a column divisible by 8 on, and their factor.
__device__ inline uint32_t LoadTileWord(const DeviceWeight& w, int64_t row, int64_t column) {
  const uint8_t* at = w.tiles + TileByte(row, column, w.in / kChunkWeights);
  return __ldcs(reinterpret_cast<const uint32_t*>(at));
}
__device__ inline float LoadTileAbsmax(const DeviceWeight& w, int64_t row, int64_t column) {
  const int64_t at = TileFactor(row, column / kChunkWeights, w.in / kChunkWeights);
  if (w.tile_absmax != nullptr) return __ldg(w.tile_absmax + at);
  return WidenAbsmax(w, (row * w.in + column) >> w.block_shift, __ldg(w.tile_absmax_byte + at));
}

// Code of weight i of the flat order.
__device__ inline uint32_t LoadCode(const DeviceWeight& w, int64_t i) {
  const uint32_t byte = __ldg(w.codes + i / 2);
  return (i & 1) == 0 ? byte >> 4 : byte & 15u;
}

template <class T>
__device__ inline T FromFloat(float value);
template <>
__device__ inline float FromFloat<float>(float value) {
  return value;
}
template <>
__device__ inline __half FromFloat<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 FromFloat<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

__device__ inline float AsFloat(float value) { return value; }
__device__ inline float AsFloat(__half value) { return __half2float(value); }
__device__ inline float AsFloat(__nv_bfloat16 value) { return __bfloat162float(value); }

}  // namespace quantmill::nf4

#endif  // QUANTMILL_PLUGINS_NF4_NF4_DEVICE_CUH_
