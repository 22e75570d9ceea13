// Products of bf16 rows with 8-bit tiles.
#include "affine_tile_kernel.cuh"

namespace affine {

template qm_status MultiplyTiles<__nv_bfloat16, 8>(qm_call* call, const DeviceWeight& w,
                                                   const __nv_bfloat16* x, int m, __nv_bfloat16* y,
                                                   float* partial);

}  // namespace affine
