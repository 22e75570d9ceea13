/* Capability qm.format/1: what packed tensors mean and how other programs store them. */
#ifndef QUANTMILL_FORMAT_H_
#define QUANTMILL_FORMAT_H_

#include "quantmill/plugin.h"

#ifdef __cplusplus
extern "C" {
#endif

#define QM_EXT_FORMAT "qm.format/1"

typedef struct qm_format { /* GROWABLE table */
  uint64_t struct_size;
  const char* format_id;      /* "qm.fmt.NAME/REVISION" */
  const char* const* targets; /* checkpoint formats by contract name: "gptq", "gptq_v2", ... */
  uint64_t target_count;      /* entries of targets */
  uint64_t flags;             /* QM_FORMAT_* */
  /* Names, dtypes, shapes and parameters are those of the format.  CPU tensors.  [call] */
  qm_status (*check)(qm_call*, const qm_packed*) QM_NOEXCEPT;
  /* Can a packed weight with these parameters and shape be stored as `target`?  QM_OK, or
   * QM_FAILED_PRECONDITION with the reason.  Needs no tensors: used before any work.  [call] */
  qm_status (*can_store)(qm_call*, const char* target, const char* format_json,
                         int64_t out_features, int64_t in_features) QM_NOEXCEPT;
  /* Tensors of one linear in the target's layout, names without the layer prefix ("qweight").
   * They are emitted with item 0.  *config_json: the target's per-layer parameters, e.g.
   * {"bits":4,"desc_act":false,"group_size":128,"sym":true}; in scratch.  CPU.  [call] */
  qm_status (*to_checkpoint)(qm_call*, const char* target, const char* layer, const qm_packed*,
                             const qm_named_tensor** out, uint64_t* count,
                             const char** config_json) QM_NOEXCEPT;
  /* The inverse: from(to(x)) equals x bit by bit.  [call] */
  qm_status (*from_checkpoint)(qm_call*, const char* target, const char* layer,
                               const qm_named_tensor* tensors, uint64_t count,
                               const char* config_json, qm_packed* out) QM_NOEXCEPT;
} qm_format;
/* Packed weights with equal parameters may be joined along out_features, so that q/k/v or gate/up
 * run as one product. */
#define QM_FORMAT_CONCAT_ROWS (UINT64_C(1) << 0)

#ifdef __cplusplus
}
#endif
#endif /* QUANTMILL_FORMAT_H_ */
