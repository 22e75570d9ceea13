// Products of f16 rows with 4-bit tiles.
#include "affine_tile_kernel.cuh"

namespace affine {

template qm_status MultiplyTiles<__half, 4>(qm_call* call, const DeviceWeight& w, const __half* x,
                                            int m, __half* y, float* partial);

}  // namespace affine
