// The operations of oftq.h as kernels on the stream of the call; oft.cu, oft_cayley.cu, lora.cu,
// services.cu.
#ifndef QUANTMILL_PLUGINS_OFTQ_OFTQ_CUDA_H_
#define QUANTMILL_PLUGINS_OFTQ_OFTQ_CUDA_H_

#include <cstdint>

#include "oftq.h"

namespace quantmill::oftq {

qm_status BuildRotationCuda(qm_call* call, const Rotation& rotation, const float* q, float* r);
qm_status RotateCuda(qm_call* call, const Rotation& rotation, const float* r, bool transposed,
                     const Rows& in, bool accumulate, const Rows& out);
qm_status RotationGradientCuda(qm_call* call, const Rotation& rotation, const float* q,
                               const float* r, const Rows& in, const float* d_out, float* d_q,
                               float* scratch);
int64_t GradientScratchCuda(const Rotation& rotation);
// d_q += the gradient from partial G [slices, in / b, b, b]; scratch: 2 rotation.elements() floats.
qm_status SkewGradientCuda(qm_call* call, const Rotation& rotation, const float* q, const float* r,
                           const float* partial, int slices, float* scratch, float* d_q);

qm_status MultiplyCuda(qm_call* call, const Product& product, float* scratch);
// Products of one shape. Member i has the operands and the result `step` elements times i behind
// those of the product.
struct Batch {
  int64_t count = 1;
  int64_t a_step = 0, b_step = 0, c_step = 0;
  int64_t c_stride = 0;  // of the rows of c
};
// With slices > 1 k is cut into as many, and their sums go unscaled to partial [slices, count, m,
// n].
qm_status MultiplyBatchCuda(qm_call* call, const Product& product, const Batch& batch,
                            int64_t slices, float* partial);
// As many as fill a GPU, and no more than pay. Depends on the shape alone.
int64_t ProductSlices(const Product& product, int64_t batch);
int64_t ProductScratchCuda();

qm_status FillUniformCuda(qm_call* call, uint64_t seed, float bound, float* values, int64_t count);
qm_status FillZeroCuda(qm_call* call, float* values, int64_t count);
// One index of scratch.
qm_status FindNotFiniteCuda(qm_call* call, const float* values, int64_t count, int64_t* index);
qm_status CopyCuda(qm_call* call, const float* from, float* to, int64_t count);

}  // namespace quantmill::oftq

#endif  // QUANTMILL_PLUGINS_OFTQ_OFTQ_CUDA_H_
