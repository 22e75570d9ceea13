// ptq.smooth: SmoothQuant's migration of activation outliers into the weights behind a norm.
#ifndef QUANTMILL_PLUGINS_PTQ_SMOOTH_H_
#define QUANTMILL_PLUGINS_PTQ_SMOOTH_H_

#include "quantmill/block_transform.h"
#include "quantmill/sdk/tensor.hpp"

namespace quantmill::ptq {

extern const qm_method kSmoothMethod;

// maximum[j] = max(maximum[j], max over rows of |weight[row, j]|); both on the call's device.
qm_status ColumnMaximumCpu(qm_call* call, qm_tensor weight, float* maximum);
qm_status ColumnMaximumCuda(qm_call* call, qm_tensor weight, float* maximum);

// The factor by which a channel's activations are divided and its weights multiplied:
//   s = max(1e-5, a^alpha / max(1e-5, w)^(1 - alpha))
// with a the largest |activation| and w the largest |weight| of the channel over all linears it
// feeds; 1 for a channel that was never active. Formula: mit-han-lab/smoothquant:
// smoothquant/smooth.py, smooth_ln_fcs.
float SmoothScale(float activation, float weight, double alpha);

}  // namespace quantmill::ptq

#endif  // QUANTMILL_PLUGINS_PTQ_SMOOTH_H_
