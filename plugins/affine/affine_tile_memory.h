// Shapes of the product with tiles (affine_tile_kernel.cuh) and what each needs of shared memory.
#ifndef QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_MEMORY_H_
#define QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_MEMORY_H_

#include "affine_tiles.h"

namespace affine {

// A warp makes Strips x 16 outputs of RowTiles x 8 rows; OutWarps x RowWarps warps are a team, and
// DepthWarps teams split the input channels of a block.
template <int RowTiles, int Strips, int OutWarps, int RowWarps, int DepthWarps, int Stages>
struct TileShape {
  static constexpr int kRowTiles = RowTiles, kStrips = Strips, kOutWarps = OutWarps,
                       kRowWarps = RowWarps, kDepthWarps = DepthWarps, kStages = Stages;
  static constexpr int kTeamWarps = OutWarps * RowWarps, kTeamThreads = 32 * kTeamWarps,
                       kThreads = kTeamThreads * DepthWarps;
  static constexpr int kTileRows = 8 * RowTiles * RowWarps, kTileStrips = Strips * OutWarps,
                       kTileOut = kStripRows * kTileStrips;
  static constexpr bool kWholeRows = false;
  static_assert(Stages >= 2);
  static_assert(8 * kTileStrips <= kTeamThreads, "eight threads copy the scales of a strip");
};

// For WideKernel (affine_wide_kernel.cuh): two groups of four warps, of 64 outputs each, by Rows
// rows.
template <int Rows, int Stages>
struct WideShape {
  static constexpr int kStages = Stages, kDepthWarps = 1, kTeamThreads = 256, kThreads = 256;
  static constexpr int kTileRows = Rows, kTileStrips = 8, kTileOut = kStripRows * kTileStrips;
  static constexpr bool kWholeRows = true;  // memory for all rows of the tile
};

inline constexpr int kUnitRowBytes = kUnit * 2;  // of a row of x

// Floats between rows of sums in shared memory, so that a warp's stores meet different banks.
inline constexpr int kTilePad = 4;

QM_HD constexpr int ElementBytes(qm_dtype dtype) {
  return dtype == QM_U8 ? 1 : dtype == QM_F32 ? 4 : 2;
}

// Shared memory of a block and what else a launch works out beforehand. A team has stages, each a
// chunk of its strips and of its rows of x, and slots for scales and zero points of groups, as many
// as its stages can touch. The sums take the place of all that in the end.
struct TilePlan {
  int rows;                     // of x in a tile
  int units;                    // of the weight
  int group_units;              // of a group
  int scale_bytes, zero_bytes;  // of a strip in a group
  int group_bytes, group_slots;
  int stage_bytes, team_bytes;
  int shared_bytes;
};

template <class Shape>
inline TilePlan MakeTilePlan(const DeviceWeight& w, Shape, int64_t m) {
  TilePlan p = {};
  p.rows = static_cast<int>(m < Shape::kTileRows && !Shape::kWholeRows ? m : Shape::kTileRows);
  p.units = static_cast<int>(w.in / kUnit);
  p.group_units = static_cast<int>(w.group_size / kUnit);
  p.scale_bytes = kStripRows * ElementBytes(w.scale_dtype);
  p.zero_bytes = w.zero == nullptr ? 0 : kStripRows * ElementBytes(w.zero_dtype);
  p.group_bytes = Shape::kTileStrips * (p.scale_bytes + p.zero_bytes);
  p.group_slots = (Shape::kStages * kChunkUnits + p.group_units - 1) / p.group_units + 1;
  p.stage_bytes =
      kChunkUnits * (Shape::kTileStrips * UnitWords(w.tile_bits) * 4 + p.rows * kUnitRowBytes);
  p.team_bytes = (Shape::kStages * p.stage_bytes + p.group_slots * p.group_bytes + 63) / 64 * 64;
  // Warps read whole tiles of eight rows: past the last ones, but not past the memory.
  const int rings = Shape::kDepthWarps * p.team_bytes + (Shape::kTileRows - p.rows) * kUnitRowBytes;
  const int sums = Shape::kDepthWarps * p.rows * (Shape::kTileOut + kTilePad) * 4;
  p.shared_bytes = sums > rings ? sums : rings;
  return p;
}

}  // namespace affine

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_MEMORY_H_
