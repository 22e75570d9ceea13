// One linear under the method, by kind: its parameters, and what qm.reparametrize/1 computes with
// them. Tensors have been checked (plugin.cc).
#ifndef QUANTMILL_PLUGINS_OFTQ_LINEAR_H_
#define QUANTMILL_PLUGINS_OFTQ_LINEAR_H_

#include "oftq.h"

namespace quantmill::oftq {

constexpr int kMostParams = 2;

// The data of the parameters, or of their gradients (null: not wanted), in the order of the plan.
struct Params {
  float* data[kMostParams] = {};
};

struct ParamShape {
  const char* name = nullptr;  // as PEFT names the module that holds it
  int64_t rows = 0, columns = 0;
};

// y = (x R) W^T.
struct RotatedLinear {
  Rotation rotation;
  int64_t out_features = 0;

  qm_status Start(qm_call* call, const Params& params) const;
  qm_status Forward(qm_call* call, const Params& params, const Rows& x, void* saved,
                    const Rows& out) const;
  qm_status Vjp(qm_call* call, const Params& params, const Rows& x, const void* saved,
                const float* d_out, float* d_x, const Params& d_params) const;
  // W R^T
  qm_status Fold(qm_call* call, const Params& params, const float* weight, float* merged) const;
  uint64_t ScratchBytes(qm_device_kind device) const;
};

// y = x W^T + (alpha / r) (x A^T) B^T.
struct LowRankLinear {
  int64_t in_features = 0, out_features = 0, rank = 0;
  float scale = 1.0f;  // alpha / r

  qm_status Start(qm_call* call, const Params& params) const;
  qm_status Forward(qm_call* call, const Params& params, const Rows& x, void* saved,
                    const Rows& out) const;
  qm_status Vjp(qm_call* call, const Params& params, const Rows& x, const void* saved,
                const float* d_out, float* d_x, const Params& d_params) const;
  // W + (alpha / r) B A
  qm_status Fold(qm_call* call, const Params& params, const float* weight, float* merged) const;
  uint64_t ScratchBytes(qm_device_kind device) const;
};

}  // namespace quantmill::oftq

#endif  // QUANTMILL_PLUGINS_OFTQ_LINEAR_H_
