/* Capability qm.linear-kernel/1: compute with packed weights. */
#ifndef QUANTMILL_LINEAR_KERNEL_H_
#define QUANTMILL_LINEAR_KERNEL_H_

#include "quantmill/plugin.h"

#ifdef __cplusplus
extern "C" {
#endif

#define QM_EXT_LINEAR_KERNEL "qm.linear-kernel/1"

typedef struct qm_linear_kernel { /* GROWABLE table: append only */
  uint64_t struct_size;
  /* 0 = cannot; else a score, higher is preferred.  `sm` is 10*major+minor, 0 on the CPU;
   * `activation` the dtype of x and y.  [scan][any] */
  int32_t (*accepts)(const char* format_id, const char* format_json, qm_device_kind device,
                     int32_t sm, qm_dtype activation) QM_NOEXCEPT;
  /* weight: [out, in] on call->device, f32, f16 or bf16, contiguous; every element is written.
   * Equals the reference of FORMATS.md, computed in f32 and rounded once to weight's dtype.  Takes
   * packed tensors as the format defines them or as prepack returned them.  [call] */
  qm_status (*dequantize)(qm_call*, const qm_packed*, qm_tensor* weight) QM_NOEXCEPT;
  /* Optional.  Emits the weight in the layout that matmul likes best; done once, at load.  The
   * result keeps the format id and is understood by this plugin alone.  [call] */
  qm_status (*prepack)(qm_call*, const qm_packed*, qm_packed* out) QM_NOEXCEPT;
  /* Optional.  Bytes of workspace that matmul needs for up to max_rows rows.  [any] */
  uint64_t (*workspace_bytes)(const qm_packed*, int64_t max_rows) QM_NOEXCEPT;
  /* Optional.  y[rows, out] = x[rows, in] W^T, f32 accumulation.  On CUDA: no allocation, no
   * synchronisation, all work on call->cuda_stream, so that it can be captured in a graph; packed
   * tensors, x, workspace and y keep their addresses for the life of such a graph.  Returns
   * QM_UNIMPLEMENTED for a shape it does not serve; the host then dequantizes.  [call] */
  qm_status (*matmul)(qm_call*, const qm_packed*, const qm_tensor* x, void* workspace,
                      qm_tensor* y) QM_NOEXCEPT;
  /* Optional.  dx[rows, in] = dy[rows, out] W: gradients through a packed base.  [call] */
  qm_status (*matmul_transposed)(qm_call*, const qm_packed*, const qm_tensor* dy, void* workspace,
                                 qm_tensor* dx) QM_NOEXCEPT;
} qm_linear_kernel;

#ifdef __cplusplus
}
#endif
#endif /* QUANTMILL_LINEAR_KERNEL_H_ */
