// Products with tiles (affine_tiles.h) of one dtype and width: the entry of each kernel file
// affine_tiles_DTYPE_BITS.cu.
#ifndef QUANTMILL_PLUGINS_AFFINE_AFFINE_MULTIPLY_TILES_H_
#define QUANTMILL_PLUGINS_AFFINE_AFFINE_MULTIPLY_TILES_H_

#include "affine_cuda.h"
#include "affine_tiles.h"

namespace affine {

// y = x W^T. x: [m, in], 16-byte aligned, y: [m, out], both device memory of type T, m >= 1; w has
// tiles of kTileBits and no permutation. Enqueued on the stream of the call. T is __half or
// __nv_bfloat16, kTileBits 2, 3, 4 or 8; defined for these in files of their own, which compile
// side by side.
template <class T, int kTileBits>
qm_status MultiplyTiles(qm_call* call, const DeviceWeight& w, const T* x, int64_t m, T* y);

}  // namespace affine

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_MULTIPLY_TILES_H_
