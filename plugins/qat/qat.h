// Quantization-aware training of one linear: the CPU path and the CUDA path behind one interface.
// Matrices are [out_features, in_features], contiguous; pointers lie on the device of the call.
#ifndef QUANTMILL_PLUGINS_QAT_QAT_H_
#define QUANTMILL_PLUGINS_QAT_QAT_H_

#include "qat_math.h"
#include "quantmill/sdk/affine_int.hpp"

namespace quantmill::qat {

// What init fills, [out, groups] each; zero is null when symmetric.
struct FreshParameters {
  float* factor = nullptr;
  float* scale_init = nullptr;
  float* zero = nullptr;
};

// A packed weight that training starts from, in the groups of the shape; no group_index.
struct Base {
  const int32_t* codes = nullptr;  // [out, words]
  const void* scale = nullptr;     // [out, groups] of scale_dtype
  const void* zero = nullptr;      // [out, groups] of zero_dtype, or null: 2^(bits-1)
  qm_dtype scale_dtype = QM_F16;   // F16, BF16 or F32
  qm_dtype zero_dtype = QM_U8;     // U8, F16, BF16 or F32
};

// The range of each group with the least squared error. INVALID_ARGUMENT names the first weight
// that is not finite.
qm_status InitFromWeightCpu(qm_call* call, const qm::AffineShape& shape,
                            qm::TensorView<const float> weight, const FreshParameters& out);
qm_status InitFromWeightCuda(qm_call* call, const qm::AffineShape& shape,
                             qm::TensorView<const float> weight, const FreshParameters& out);

// Scales and zero points (rounded) of the base. start, unless null: weights in the base's cells, as
// near to `weight` as that allows. INVALID_ARGUMENT for a weight, scale or zero that is not finite,
// and for a scale that is not positive.
qm_status InitFromBaseCpu(qm_call* call, const qm::AffineShape& shape,
                          qm::TensorView<const float> weight, const Base& base,
                          const FreshParameters& out, float* start);
qm_status InitFromBaseCuda(qm_call* call, const qm::AffineShape& shape,
                           qm::TensorView<const float> weight, const Base& base,
                           const FreshParameters& out, float* start);

// out [out, in] of type out_dtype: the weight on its grid, rounded once to it.
qm_status ForwardCpu(qm_call* call, const qm::AffineShape& shape, const float* weight,
                     const Parameters& params, qm_dtype out_dtype, void* out);
qm_status ForwardCuda(qm_call* call, const qm::AffineShape& shape, const float* weight,
                      const Parameters& params, qm_dtype out_dtype, void* out);

// Gradients that vjp adds to; null where none is wanted.
struct Gradients {
  float* weight = nullptr;  // [out, in]
  float* factor = nullptr;  // [out, groups]
  float* zero = nullptr;    // [out, groups]
};
qm_status VjpCpu(qm_call* call, const qm::AffineShape& shape, const float* weight,
                 const Parameters& params, const float* d_out, const Gradients& out);
qm_status VjpCuda(qm_call* call, const qm::AffineShape& shape, const float* weight,
                  const Parameters& params, const float* d_out, const Gradients& out);

// Codes, scale and zero of `out`: what ForwardCpu computes, packed. INVALID_ARGUMENT for a weight
// or parameter that is not finite.
qm_status FinalizeCpu(qm_call* call, const qm::AffineShape& shape,
                      qm::TensorView<const float> weight, const Parameters& params,
                      const qm::AffineTensors& out);
qm_status FinalizeCuda(qm_call* call, const qm::AffineShape& shape,
                       qm::TensorView<const float> weight, const Parameters& params,
                       const qm::AffineTensors& out);

// Finds the tensors of `packed` that shape describes; *out points into it. INVALID_ARGUMENT for
// tensors that are missing or of another shape, FAILED_PRECONDITION for groups that are not
// neighbouring channels.
qm_status ReadBase(qm_call* call, const qm::AffineShape& shape, const qm_packed& packed, Base* out);

// The error for a trained value that is not finite.
inline qm_status Diverged(qm_call* call, const char* what, int64_t row, int64_t column) {
  return qm::Fail(call, QM_INVALID_ARGUMENT, "the trained ", what, " at row ", row, ", column ",
                  column, " is NaN or infinite: training has diverged; lower train.lr");
}

// The error for a base whose group `index` has no usable scale or zero point.
inline qm_status DamagedBase(qm_call* call, const qm::AffineShape& shape, int64_t index) {
  return qm::Fail(call, QM_INVALID_ARGUMENT, "the packed weight has no usable scale or zero point ",
                  "at row ", index / shape.groups(), ", group ", index % shape.groups(),
                  "; run the stage that packed it again");
}

}  // namespace quantmill::qat

#endif  // QUANTMILL_PLUGINS_QAT_QAT_H_
