// The layout that products on tensor cores read, made once at load (nf4_prepack.cu). Instead of
// codes and factors a weight has
//
//   tiles        U8  [tiles chunks 512]  codes of 16 outputs by 64 channels, by chunk: 16 bytes of
//                    each lane of a warp, what it needs of outputs g and g + 8 (lane 4g + t:
//                    channels 16t ... 16t+15), 8 bytes each
//   tile_absmax  F32 or U8 [tiles chunks 16]   their factors, once per chunk: of outputs g and g +
//   8
//                    side by side
//   codebook, and with double quantization nested_absmax, nested_codebook, absmax_offset as before
//
// with tiles = ceil(out / 16), chunks = in / 64. Outputs beyond the last have codes and factors 0.
// Factors stay bytes where a range has a power of two of them (256 in the files of bitsandbytes);
// else they become f32, and the nested tensors are not there.
#ifndef QUANTMILL_PLUGINS_NF4_NF4_TILES_H_
#define QUANTMILL_PLUGINS_NF4_NF4_TILES_H_

#include "nf4.h"

namespace quantmill::nf4 {

inline constexpr int kTileOutputs = 16;
inline constexpr int kChunkShift = 6, kChunkWeights = 1 << kChunkShift;
inline constexpr int kLaneBytes = 16, kTileChunkBytes = 32 * kLaneBytes;

inline int64_t TilesOf(int64_t out) { return (out + kTileOutputs - 1) / kTileOutputs; }

// Whether a weight can have the layout: a chunk lies in one row and one block.
inline bool TilesFit(const Params& params, int64_t in) {
  return in % kChunkWeights == 0 && params.block_size >= kChunkWeights;
}

inline bool KeepsBytes(const Params& params) {
  const int64_t size = params.nested_block_size;
  return size > 0 && (size & (size - 1)) == 0;
}

// Where the codes of channels `column` and column + 1 (even) of output `row` lie in `tiles`.
QM_HD inline int64_t TileByte(int64_t row, int64_t column, int64_t chunks) {
  const int64_t chunk = row / kTileOutputs * chunks + column / kChunkWeights;
  const int64_t lane = row % 8 * 4 + column % kChunkWeights / 16;
  return (chunk * 32 + lane) * kLaneBytes + row % kTileOutputs / 8 * 8 + column % 16 / 2;
}

// Where the factor of output `row` and a chunk of its row lies in `tile_absmax`.
QM_HD inline int64_t TileFactor(int64_t row, int64_t chunk_of_row, int64_t chunks) {
  const int64_t chunk = row / kTileOutputs * chunks + chunk_of_row;
  return chunk * kTileOutputs + row % 8 * 2 + row % kTileOutputs / 8;
}

}  // namespace quantmill::nf4

#endif  // QUANTMILL_PLUGINS_NF4_NF4_TILES_H_
