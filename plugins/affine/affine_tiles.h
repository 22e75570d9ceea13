// The layout of codes that the tensor-core product reads ("tiles"), and the view of a weight that
// kernels take.
//
// mma.m16n8k16 takes W as its first operand: 16 output rows by 16 input channels per instruction.
// In PTX's fragment layout lane 4g+t of a warp holds rows g and g+8. Two instructions cover a unit
// of 32 channels:
//   channel in unit = 16j + 8 (u / 2) + 2t + u % 2     j = which of the two instructions, u = 0..3
//   fragment register i = 2 (u / 2) + (row >= 8), half h = u % 2
//
// Tiles lie as [strip of 16 rows][unit][words], a unit being 16 words per bit, so that a warp reads
// contiguous memory. Inside a unit fields are placed so that few instructions turn them into
// operands (affine_tile_decode.cuh):
//   2 bits: word lane,                 field i + 4j, in the low half if h = 0, else in the high
//   half 4 bits: word 2 lane + j,           field i, halves likewise 8 bits: word 4 lane + 2j + i /
//   2,  byte 2 (i % 2) + h 3 bits: the low two bits as 2-bit codes; bit 2 in byte h of 16-bit word
//   64 + lane, see HighBit
// 1-bit codes are stored as 2-bit ones. A strip has whole chunks of kChunkUnits units, which are
// what a warp copies at a time; codes beyond the last input channel are zero and not used.
// Scales and zero points lie as [strip][group][16 rows].
#ifndef QUANTMILL_PLUGINS_AFFINE_AFFINE_TILES_H_
#define QUANTMILL_PLUGINS_AFFINE_AFFINE_TILES_H_

#include <cstdint>

#include "affine.h"

namespace affine {

inline constexpr int kStripRows = 16;
inline constexpr int kUnit = 32;  // input channels

inline constexpr int kChunkUnits = 4;

QM_HD constexpr int TileBits(int bits) { return bits == 1 ? 2 : bits; }
QM_HD constexpr int UnitWords(int tile_bits) { return 16 * tile_bits; }
QM_HD constexpr int64_t TileChunks(int64_t in) {
  return (in + kChunkUnits * kUnit - 1) / (kChunkUnits * kUnit);
}

// Bit 2 of a 3-bit code of instruction j: where it lies in its byte. Rows g and g+8 have theirs two
// apart, as the low bits are.
QM_HD constexpr int HighBit(int j, int i) { return 4 * j + i / 2 + i % 2 * 2; }

struct TilePlace {
  int64_t word;
  int shift;
  int64_t high_word;  // of bit 2 of 3-bit codes, else -1
  int high_shift;
};

// Where the code of (row, channel) lies. chunks: of a strip.
QM_HD constexpr TilePlace LocateTile(int tile_bits, int64_t chunks, int64_t row, int64_t channel) {
  const int r = static_cast<int>(row % kStripRows);
  const int in_unit = static_cast<int>(channel % kUnit);
  const int j = in_unit / 16, t = in_unit % 8 / 2, u = in_unit % 16 / 8 * 2 + in_unit % 2;
  const int i = 2 * (u / 2) + r / 8, h = u % 2;
  const int lane = r % 8 * 4 + t;
  const int64_t unit = row / kStripRows * chunks * kChunkUnits + channel / kUnit;
  const int64_t first = unit * UnitWords(tile_bits);
  if (tile_bits == 4) return {first + 2 * lane + j, 4 * i + 16 * h, -1, 0};
  if (tile_bits == 8) return {first + 4 * lane + 2 * j + i / 2, 8 * (2 * (i % 2) + h), -1, 0};
  const int64_t high = tile_bits == 3 ? first + 32 + lane / 2 : -1;
  return {first + lane, 2 * (i + 4 * j) + 16 * h, high, lane % 2 * 16 + 8 * h + HighBit(j, i)};
}

// What kernels need of a weight; passed by value.
struct DeviceWeight {
  const int32_t* codes;
  const uint32_t* tiles;  // instead of codes
  const void* scale;      // [out, groups], with tiles [strips, groups, 16]
  const void* zero;       // likewise; null = middle
  const float* scale_range;
  const float* zero_range;
  const int32_t* group_index;
  const int32_t* permutation;
  int64_t out, in, groups, group_size, words, chunks, strips;
  int bits, tile_bits, axis;
  qm_dtype scale_dtype, zero_dtype;
};

inline DeviceWeight ToDeviceWeight(const Weight& w) {
  const int tile_bits = TileBits(w.params.bits);
  return {w.codes,       w.tiles,          w.scale,
          w.zero,        w.scale_range,    w.zero_range,
          w.group_index, w.permutation,    w.out,
          w.in,          w.groups,         w.group_size,
          w.words,       TileChunks(w.in), (w.out + kStripRows - 1) / kStripRows,
          w.params.bits, tile_bits,        w.params.axis,
          w.scale_dtype, w.zero_dtype};
}

}  // namespace affine

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_TILES_H_
