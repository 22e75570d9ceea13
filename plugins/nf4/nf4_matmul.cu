// y = x W^T with packed W on the GPU: which activation type. The kernels are in nf4_matmul.cuh.
#include "nf4_cuda.h"

namespace quantmill::nf4 {

qm_status CudaMatmul(qm_call* call, const Weight& weight, const qm_tensor& x, qm_tensor* y) {
  const int64_t m = x.shape[0];
  if (m > kCudaMaxRows) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "products with packed weights are served for up to ",
                    kCudaMaxRows, " rows");
  }
  const DeviceWeight w = ToDeviceWeight(weight);
  const int rows = static_cast<int>(m);
  if (x.dtype == QM_F32) return MatmulF32(call, w, x.data, rows, y->data);
  if (x.dtype == QM_F16) return MatmulF16(call, w, x.data, rows, y->data);
  return MatmulBF16(call, w, x.data, rows, y->data);
}

}  // namespace quantmill::nf4
