// Products of bf16 rows with 4-bit tiles.
#include "affine_tile_launch.cuh"

namespace affine {

template qm_status MultiplyTiles<__nv_bfloat16, 4>(qm_call*, const DeviceWeight&,
                                                   const __nv_bfloat16*, int64_t, __nv_bfloat16*);

}  // namespace affine
