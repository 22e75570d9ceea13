// Small device functions shared by the kernels.
#ifndef QUANTMILL_PLUGINS_AFFINE_AFFINE_DEVICE_CUH_
#define QUANTMILL_PLUGINS_AFFINE_AFFINE_DEVICE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "affine_tiles.h"

namespace affine {

__device__ inline float LoadNumber(const void* data, qm_dtype dtype, int64_t index) {
  switch (dtype) {
    case QM_F16:
      return __half2float(static_cast<const __half*>(data)[index]);
    case QM_BF16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
    case QM_U8:
      return static_cast<float>(static_cast<const uint8_t*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

// Scale and zero point at element `at` of the scale tensor. Bytes are widened as on the CPU,
// without contraction.
__device__ inline ScaleZero LoadScaleZeroAtPlace(const DeviceWeight& w, int64_t at) {
  ScaleZero sz = {LoadNumber(w.scale, w.scale_dtype, at), static_cast<float>(1 << (w.bits - 1))};
  if (w.zero != nullptr) sz.zero = LoadNumber(w.zero, w.zero_dtype, at);
  if (w.scale_range != nullptr) {
    const float* range = w.scale_range + at / kQ8Block * 2;
    sz.scale = __fadd_rn(range[1], __fmul_rn(range[0], sz.scale));
  }
  if (w.zero_range != nullptr) {
    sz.zero = __fadd_rn(w.zero_range[1], __fmul_rn(w.zero_range[0], sz.zero));
  }
  return sz;
}

// Where scale and zero point of (row, group) lie, axis 1.
__device__ inline int64_t GroupPlace(const DeviceWeight& w, int64_t row, int64_t group) {
  if (w.tiles == nullptr) return row * w.groups + group;
  return (row / kStripRows * w.groups + group) * kStripRows + row % kStripRows;
}

// The code of (row, column) in either layout; columns as stored.
__device__ inline uint32_t LoadCode(const DeviceWeight& w, int64_t row, int64_t column) {
  if (w.tiles != nullptr) {
    const TilePlace place = LocateTile(w.tile_bits, w.chunks, row, column);
    const uint32_t low = w.tiles[place.word] >> place.shift;
    if (place.high_word < 0) return low & ((1u << w.tile_bits) - 1u);
    return (low & 3u) | (w.tiles[place.high_word] >> place.high_shift & 1u) << 2;
  }
  const int64_t bit = column * w.bits;
  const int shift = static_cast<int>(bit % 32);
  const int32_t* word = w.codes + row * w.words + bit / 32;
  uint32_t field = static_cast<uint32_t>(word[0]) >> shift;
  if (shift + w.bits > 32) field |= static_cast<uint32_t>(word[1]) << (32 - shift);
  return field & ((1u << w.bits) - 1u);
}

// The codes of columns [column, column + 8) of a row of tiles; column is a multiple of 8. In tiles
// they lie in four neighbouring lanes, two in each.
__device__ inline void LoadEightOfTiles(const DeviceWeight& w, int64_t row, int64_t column,
                                        uint32_t (&codes)[8]) {
  const TilePlace first = LocateTile(w.tile_bits, w.chunks, row, column);
  const int lane_words = w.tile_bits < 4 ? 1 : w.tile_bits / 2;
  const int second = w.tile_bits == 8 ? 8 : 16;  // shift from the first of two codes to the other
  const uint32_t mask = w.tile_bits == 3 ? 3u : (1u << w.tile_bits) - 1u;
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    const uint32_t word = w.tiles[first.word + lane * lane_words] >> first.shift;
    codes[2 * lane] = word & mask;
    codes[2 * lane + 1] = word >> second & mask;
    if (first.high_word < 0) continue;
    const uint32_t high = w.tiles[first.high_word + lane / 2] >> (first.high_shift + lane % 2 * 16);
    codes[2 * lane] |= (high & 1u) << 2;
    codes[2 * lane + 1] |= (high >> 8 & 1u) << 2;
  }
}

__device__ inline int64_t GroupOf(const DeviceWeight& w, int64_t column) {
  return w.group_index != nullptr ? w.group_index[column] : column / w.group_size;
}

// Where scale and zero point of (row, column) lie.
__device__ inline int64_t ScalePlace(const DeviceWeight& w, int64_t row, int64_t column) {
  if (w.axis == 0) return row % w.groups * w.in + column;
  return GroupPlace(w, row, GroupOf(w, column));
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
__device__ inline float AsFloat(uint8_t value) { return static_cast<float>(value); }
__device__ inline float AsFloat(__half value) { return __half2float(value); }
__device__ inline float AsFloat(__nv_bfloat16 value) { return __bfloat162float(value); }

}  // namespace affine

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_DEVICE_CUH_
