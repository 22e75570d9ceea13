// Rounding of eetq: INT8 with a scale per output channel. (FP8: quantmill/sdk/float8.hpp.)
//
//   s = max |w| of the row / 128,  code = clamp(round(w / s), -128, 127), halves away from zero
//
// The division uses s in f32, the stored scale is s rounded to its type
// (eetq: csrc/cutlass_kernels/cutlass_preprocessors.cc, symmetric_quantize). Where the stored type
// cannot hold s with its usual precision (s below its smallest normal value or beyond its largest),
// w is divided by the stored scale instead. A row of zeros has scale 1/128 and codes 0.
#ifndef QUANTMILL_PLUGINS_EETQ_QUANTIZE_H_
#define QUANTMILL_PLUGINS_EETQ_QUANTIZE_H_

#include <cmath>

#include "quantmill/sdk/float8.hpp"
#include "quantmill/sdk/row8.hpp"

namespace eetq {

// Scale as stored, and what weights are divided by.
struct RowScale {
  float stored, divisor;
};

QM_HD inline RowScale ScaleOfRow(float largest, qm_dtype dtype) {
  const float scale = (largest > 0.0f ? largest : 1.0f) / 128.0f;
  const float stored = qm::RoundScale(scale, dtype);
  const float least = dtype == QM_F16 ? 0x1p-14f : 0x1p-126f;
  const float most = dtype == QM_F16 ? 65504.0f : 0x1.fep127f;
  const bool normal = scale >= least && scale <= most;
  return {stored, normal ? scale : stored};
}

// clamp(round(w / divisor), -128, 127) for finite w, halves away from zero.
QM_HD inline int8_t EncodeInt8(float w, float divisor) {
  float q = w / divisor;
  q = q > -129.0f ? q : -129.0f;
  q = q < 129.0f ? q : 129.0f;
  // Below 2^22 the sum with a half of the same sign is exact, but for values just under a half,
  // which truncation must not take up to one.
  const float magnitude = fabsf(q);
  float whole = truncf(magnitude);
  if (magnitude - whole >= 0.5f) whole += 1.0f;
  const float code = q < 0.0f ? -whole : whole;
  return static_cast<int8_t>(code > -128.0f ? (code < 127.0f ? code : 127.0f) : -128.0f);
}

// Fill codes and scale of `out` from weight [out_features, in_features]. INVALID_ARGUMENT names the
// first weight that is not finite; CANCELLED when progress says so.
qm_status QuantizeInt8Cpu(qm_call* call, const qm::Row8Layout& layout,
                          qm::TensorView<const float> weight, const qm::Row8Tensors& out);
qm_status QuantizeInt8Cuda(qm_call* call, const qm::Row8Layout& layout,
                           qm::TensorView<const float> weight, const qm::Row8Tensors& out);
// qm::QuantizeFloat8Cuda and its scratch, compiled once.
qm_status QuantizeFp8Cuda(qm_call* call, const qm::Row8Layout& layout,
                          qm::TensorView<const float> weight, const qm::Row8Tensors& out);
// Of either.
uint64_t CudaScratchBytes(const qm::Row8Layout& layout);

}  // namespace eetq

#endif  // QUANTMILL_PLUGINS_EETQ_QUANTIZE_H_
