// Round to nearest, one linear at a time: the CPU path and the CUDA path behind one interface.
#ifndef QUANTMILL_PLUGINS_PTQ_PTQ_H_
#define QUANTMILL_PLUGINS_PTQ_PTQ_H_

#include "quantmill/sdk/affine_int.hpp"
#include "quantmill/sdk/affine_search.hpp"
#include "quantmill/sdk/tensor.hpp"

namespace quantmill::ptq {

struct Options {
  qm::AffineShape shape;
  qm::AffineSearch search;
};

// Fill codes, scale and zero of `out` from weight [out_features, in_features]. INVALID_ARGUMENT
// names the first weight that is not finite; CANCELLED when progress says so.
qm_status QuantizeCpu(qm_call* call, const Options& options, qm::TensorView<const float> weight,
                      const qm::AffineTensors& out);
qm_status QuantizeCuda(qm_call* call, const Options& options, qm::TensorView<const float> weight,
                       const qm::AffineTensors& out);

// Scratch that QuantizeCuda asks for.
uint64_t CudaScratchBytes(const qm::AffineShape& shape);

using qm::NotFinite;

}  // namespace quantmill::ptq

#endif  // QUANTMILL_PLUGINS_PTQ_PTQ_H_
