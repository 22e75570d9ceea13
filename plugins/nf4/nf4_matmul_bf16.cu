// Products with bf16 activations; see nf4_matmul.cuh.
#include "nf4_matmul.cuh"

namespace quantmill::nf4 {

qm_status MatmulBF16(qm_call* call, const DeviceWeight& w, const void* x, int m, void* y) {
  return MatmulOf<__nv_bfloat16>(call, w, x, m, y);
}

}  // namespace quantmill::nf4
