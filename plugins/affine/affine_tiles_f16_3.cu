// Products of f16 rows with 3-bit tiles.
#include "affine_tile_launch.cuh"

namespace affine {

template qm_status MultiplyTiles<__half, 3>(qm_call*, const DeviceWeight&, const __half*, int64_t,
                                            __half*);

}  // namespace affine
