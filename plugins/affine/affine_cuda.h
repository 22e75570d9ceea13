// The CUDA side of the plugin. Present only in a CUDA build (QM_HAVE_CUDA).
#ifndef QUANTMILL_PLUGINS_AFFINE_AFFINE_CUDA_H_
#define QUANTMILL_PLUGINS_AFFINE_AFFINE_CUDA_H_

#include "affine.h"

namespace affine {

// Rows that the products below serve; the host dequantizes for more. Times up to there are in
// README.md; from how many rows on dequantizing and a dense product are faster is not yet measured.
inline constexpr int64_t kCudaMaxRows = 256;
// Rows for which the plain kernel (no tiles, or f32) serves.
inline constexpr int64_t kCudaPlainMaxRows = 8;

// Tiles need whole units of 32 input channels inside one group.
bool CudaTilesFit(const Weight& weight);

qm_status CudaDequantize(qm_call* call, const Weight& weight, qm_tensor* out);
qm_status CudaPrepack(qm_call* call, const Weight& weight, qm_packed* out);
uint64_t CudaWorkspaceBytes(const Weight& weight, int64_t max_rows);
qm_status CudaMatmul(qm_call* call, const Weight& weight, const qm_tensor& x, void* workspace,
                     qm_tensor* y);

}  // namespace affine

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_CUDA_H_
