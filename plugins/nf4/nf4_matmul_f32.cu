// Products with f32 activations; see nf4_matmul.cuh.
#include "nf4_matmul.cuh"

namespace quantmill::nf4 {

qm_status MatmulF32(qm_call* call, const DeviceWeight& w, const void* x, int m, void* y) {
  return MatmulOf<float>(call, w, x, m, y);
}

}  // namespace quantmill::nf4
