// The layout of codes that the tensor-core product reads ("tiles"), and the view of a weight that
// kernels take.
//
// mma.m16n8k16 takes W as its first operand: 16 output rows by 16 input channels per instruction.
// In PTX's fragment layout lane 4g+t of a warp holds rows g and g+8. Two instructions cover a unit
// of 32 channels, and since the order of channels inside a sum is free, lane t of four takes
// channels 8t..8t+7 of the unit: its part of x is then one 16-byte load.
//
//   channel in unit = 8t + 4j + u      j = which of the two instructions, u = 0..3
//   fragment register i = 2 * (u / 2) + (row >= 8), half h = u % 2
//
// A chunk is what a lane reads with one 16-byte load: 8/bits units. Chunks lie as
// [strip of 16 rows][chunk][lane][4 words], so that a warp reads 512 contiguous bytes. Inside a
// word fields are placed for conversion by one logic instruction per pair (see
// affine_tile_kernel.cuh):
//   2 bits: word = unit,        field i + 4j, in the low half if h = 0, else in the high half
//   4 bits: word = 2 unit + j,  field i, halves likewise
//   8 bits: word = 2j + i / 2,  byte 2 (i % 2) + h
// 3-bit codes are stored as 4-bit ones, 1-bit codes as 2-bit ones.
#ifndef QUANTMILL_PLUGINS_AFFINE_AFFINE_TILES_H_
#define QUANTMILL_PLUGINS_AFFINE_AFFINE_TILES_H_

#include <cstdint>

#include "affine.h"

namespace affine {

inline constexpr int kStripRows = 16;
inline constexpr int kUnit = 32;  // input channels

QM_HD constexpr int TileBits(int bits) { return bits == 3 ? 4 : bits == 1 ? 2 : bits; }
QM_HD constexpr int UnitsPerChunk(int tile_bits) { return 8 / tile_bits; }
QM_HD constexpr int64_t TileChunks(int64_t in, int tile_bits) {
  const int64_t per_chunk = kUnit * UnitsPerChunk(tile_bits);
  return (in + per_chunk - 1) / per_chunk;
}

struct TilePlace {
  int64_t word;
  int shift;
};

// Where the code of (row, channel) lies.
QM_HD constexpr TilePlace LocateTile(int tile_bits, int64_t chunks, int64_t row, int64_t channel) {
  const int r = static_cast<int>(row % kStripRows);
  const int in_unit = static_cast<int>(channel % kUnit);
  const int t = in_unit / 8, j = in_unit % 8 / 4, u = in_unit % 4;
  const int i = 2 * (u / 2) + r / 8, h = u % 2;
  const int units = UnitsPerChunk(tile_bits);
  const int unit = static_cast<int>(channel / kUnit % units);
  const int64_t chunk = channel / kUnit / units;
  const int lane = r % 8 * 4 + t;
  const int word = tile_bits == 2 ? unit : tile_bits == 4 ? 2 * unit + j : 2 * j + i / 2;
  const int shift = tile_bits == 2   ? 2 * (i + 4 * j) + 16 * h
                    : tile_bits == 4 ? 4 * i + 16 * h
                                     : 8 * (2 * (i % 2) + h);
  return {((row / kStripRows * chunks + chunk) * 32 + lane) * 4 + word, shift};
}

// What kernels need of a weight; passed by value.
struct DeviceWeight {
  const int32_t* codes;
  const uint32_t* tiles;  // instead of codes
  const void* scale;      // [out, groups], with tiles [groups, padded_out]
  const void* zero;       // likewise; null = middle
  const float* scale_range;
  const float* zero_range;
  const int32_t* group_index;
  const int32_t* permutation;
  int64_t out, in, groups, group_size, words, chunks, padded_out;
  int bits, tile_bits, axis;
  qm_dtype scale_dtype, zero_dtype;
};

inline DeviceWeight ToDeviceWeight(const Weight& w) {
  const int tile_bits = TileBits(w.params.bits);
  return {w.codes,       w.tiles,
          w.scale,       w.zero,
          w.scale_range, w.zero_range,
          w.group_index, w.permutation,
          w.out,         w.in,
          w.groups,      w.group_size,
          w.words,       TileChunks(w.in, tile_bits),
          w.padded_out,  w.params.bits,
          tile_bits,     w.params.axis,
          w.scale_dtype, w.zero_dtype};
}

}  // namespace affine

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_TILES_H_
