// Products with tiles (affine_tiles.h) of one dtype and width: how a product is split, and the
// entry of each kernel file affine_tiles_DTYPE_BITS.cu.
#ifndef QUANTMILL_PLUGINS_AFFINE_AFFINE_MULTIPLY_TILES_H_
#define QUANTMILL_PLUGINS_AFFINE_AFFINE_MULTIPLY_TILES_H_

#include <algorithm>

#include "affine_cuda.h"
#include "affine_tiles.h"

namespace affine {

inline constexpr int kSliceRows = 64;  // rows of x that one launch handles
// Blocks to aim for when splitting the input channels: two per multiprocessor of an H100. A
// constant, so that the split, and with it the order of sums, does not depend on the device.
inline constexpr int64_t kTargetBlocks = 264;
inline constexpr int64_t kMaxSplits = 8;

// Shapes of TileKernel: few rows of x want many warps on the input channels; many rows want two
// strips per load of x and fewer sums to combine.
inline constexpr int kFewStrips = 1, kFewWarps = 8, kManyStrips = 2, kManyWarps = 4;
inline constexpr int kFewRows = 16;

// Blocks in y so that small layers fill the GPU too, with at least a chunk for every warp.
inline int64_t Splits(const DeviceWeight& w, int strips_per_block, int warps) {
  const int64_t strips = w.padded_out / kStripRows;
  const int64_t blocks = (strips + strips_per_block - 1) / strips_per_block;
  const int64_t wanted = std::clamp<int64_t>(kTargetBlocks / blocks, 1, kMaxSplits);
  return std::max<int64_t>(1, std::min(wanted, w.chunks / warps));
}

// y = x W^T. x: [m, in], y: [m, out], both device memory of type T, 1 <= m <= kSliceRows; w has
// tiles of kTileBits and no permutation. partial: device memory for Splits(...) * m * out floats
// where a product is split. Enqueued on the stream of the call. T is __half or __nv_bfloat16,
// kTileBits 2, 4 or 8; defined for these in files of their own, which compile side by side.
template <class T, int kTileBits>
qm_status MultiplyTiles(qm_call* call, const DeviceWeight& w, const T* x, int m, T* y,
                        float* partial);

}  // namespace affine

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_MULTIPLY_TILES_H_
