/* Capability qm.reparametrize/1: trained parameters on or around a linear (QAT, OFT, LoRA).  The
 * host owns data, loss, optimizer and schedule; the plugin owns f and its derivative. */
#ifndef QUANTMILL_REPARAMETRIZE_H_
#define QUANTMILL_REPARAMETRIZE_H_

#include "quantmill/plugin.h"
#include "quantmill/quantize_linear.h"

#ifdef __cplusplus
extern "C" {
#endif

#define QM_EXT_REPARAMETRIZE "qm.reparametrize/1"

typedef int32_t qm_reparam_kind;
enum {
  QM_REPARAM_WEIGHT = 1, /* W_eff = f(W, theta): dense base, or one started from a packed slot */
  QM_REPARAM_INPUT = 2,  /* y = g(x, theta) W^T: works over a packed base */
  QM_REPARAM_DELTA = 3   /* y = x W^T + h(x, theta): works over a packed base */
};

typedef int32_t qm_reparam_phase; /* the host's training phase, told to the plugin */
enum { QM_PHASE_BLOCK = 1, QM_PHASE_END_TO_END = 2 };

typedef struct qm_param {     /* FROZEN */
  const char* name;           /* unique within the method */
  int64_t shape[QM_MAX_RANK]; /* unused entries are 1 */
  double lr_scale;            /* factor on the stage's learning rate */
  qm_dtype dtype;             /* of the parameter */
  int32_t rank;               /* 0..QM_MAX_RANK */
  uint64_t flags;             /* QM_PARAM_* */
} qm_param;
#define QM_PARAM_TRAINABLE (UINT64_C(1) << 0)
#define QM_PARAM_NO_DECAY (UINT64_C(1) << 1)

typedef struct qm_reparam_info { /* GROWABLE */
  uint64_t struct_size;
  const qm_linear_info* linear; /* the linear it stands on or around */
  const qm_packed* base;        /* NULL when the slot is dense */
  qm_reparam_phase phase;       /* QM_PHASE_* */
  int32_t reserved;             /* zero */
} qm_reparam_info;

typedef struct qm_reparam_plan { /* GROWABLE, filled by the plugin */
  uint64_t struct_size;
  const qm_param* params;       /* static or in scratch */
  uint64_t param_count;         /* entries of params */
  uint64_t saved_bytes_per_row; /* kept by the host between forward and vjp; row = row of `in` */
  uint64_t saved_bytes_fixed;   /* the same, independent of the rows */
  uint64_t scratch_bytes;       /* peak upper bound */
  const qm_stat_request* stats; /* for init; may be none */
  uint64_t stat_count;          /* entries of stats */
  qm_reparam_kind kind;         /* QM_REPARAM_* */
  int32_t reserved;             /* zero */
} qm_reparam_plan;

typedef struct qm_reparametrize { /* GROWABLE table */
  uint64_t struct_size;
  /* From shapes and options alone.  [call] */
  qm_status (*plan)(qm_call*, const qm_reparam_info*, qm_reparam_plan* out) QM_NOEXCEPT;
  /* Fills params.  weight is NULL when the base is packed and dense values are not needed. */
  qm_status (*init)(qm_call*, const qm_reparam_info*, const qm_tensor* weight, const qm_stats*,
                    qm_named_tensor* params, uint64_t param_count) QM_NOEXCEPT;
  /* in = W or x, by kind.  Pure in (in, params, seed). */
  qm_status (*forward)(qm_call*, const qm_reparam_info*, const qm_tensor* in,
                       const qm_named_tensor* params, uint64_t param_count, void* saved,
                       qm_tensor* out) QM_NOEXCEPT;
  /* Accumulates into d_in (NULL if not wanted) and d_params. */
  qm_status (*vjp)(qm_call*, const qm_reparam_info*, const qm_tensor* in,
                   const qm_named_tensor* params, uint64_t param_count, const void* saved,
                   const qm_tensor* d_out, qm_tensor* d_in, qm_named_tensor* d_params) QM_NOEXCEPT;
  /* Optional: fold theta away.  A dense result through emit(0, "weight"), or a packed one. */
  qm_status (*finalize)(qm_call*, const qm_reparam_info*, const qm_tensor* weight,
                        const qm_named_tensor* params, uint64_t param_count,
                        qm_packed* out) QM_NOEXCEPT;
} qm_reparametrize;

#ifdef __cplusplus
}
#endif
#endif /* QUANTMILL_REPARAMETRIZE_H_ */
