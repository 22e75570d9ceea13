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

/* In qm_method.flags: training with this method leaves packed slots (WEIGHT with a format_id). */
#define QM_METHOD_TRAINS_TO_PACKED (UINT64_C(1) << 16)

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
  /* What the slot is packed as; NULL when it is dense.  Its tensors are there (device memory) for
   * init and finalize; at other times there may be none (tensor_count 0). */
  const qm_packed* base;
  qm_reparam_phase phase; /* QM_PHASE_* */
  int32_t reserved;       /* zero */
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
  /* Minor 1, WEIGHT: factor on the learning rate of W itself; 0 = W stays as it was given. */
  double weight_lr_scale;
  /* Minor 1, WEIGHT: what finalize will give, as in qm_quant_plan; NULL = a dense weight. */
  const char* format_id;
  const char* format_json; /* NULL = not known before */
  double bits_per_weight;  /* 0 = unknown */
  uint64_t flags;          /* minor 1: QM_REPARAM_FOLD or 0 */
} qm_reparam_plan;
/* INPUT, DELTA: fold the parameters away after training, by finalize.  The slot becomes dense. */
#define QM_REPARAM_FOLD (UINT64_C(1) << 0)

typedef struct qm_reparametrize { /* GROWABLE table */
  uint64_t struct_size;
  /* From shapes and options alone, once for each phase: the parameters are the same in both, their
   * flags and learning rates may differ.  QM_UNIMPLEMENTED: this linear is left alone, or the
   * method has no such phase.  [call]
   */
  qm_status (*plan)(qm_call*, const qm_reparam_info*, qm_reparam_plan* out) QM_NOEXCEPT;
  /* Fills params.  weight: f32 [out, in], what a dense slot holds and, of WEIGHT, what it held
   * before it was packed as `base`; NULL for INPUT and DELTA over a packed base.  WEIGHT may emit a
   * tensor (0, "weight"), f32 [out, in]: the W that training starts from.  [call] */
  qm_status (*init)(qm_call*, const qm_reparam_info*, const qm_tensor* weight, const qm_stats*,
                    qm_named_tensor* params, uint64_t param_count) QM_NOEXCEPT;
  /* in = W (f32) or x [rows, in] (f32, f16 or bf16), by kind; params f32; out of the dtype the run
   * computes in, that of x: W_eff, g(x), or h(x) [rows, out].  All contiguous.  saved: NULL when no
   * vjp follows.  Pure in (in, params, seed).  [call] */
  qm_status (*forward)(qm_call*, const qm_reparam_info*, const qm_tensor* in,
                       const qm_named_tensor* params, uint64_t param_count, void* saved,
                       qm_tensor* out) QM_NOEXCEPT;
  /* Accumulates into d_in (NULL if not wanted) and d_params; d_out, d_in and d_params are f32.
   * A parameter that is not trained has a d_params tensor with data NULL.  [call] */
  qm_status (*vjp)(qm_call*, const qm_reparam_info*, const qm_tensor* in,
                   const qm_named_tensor* params, uint64_t param_count, const void* saved,
                   const qm_tensor* d_out, qm_tensor* d_in, qm_named_tensor* d_params) QM_NOEXCEPT;
  /* Optional: fold theta away.  weight: f32 [out, in], W as trained, or what the base dequantizes
   * to.  A dense result through emit(0, "weight"), f32, or a packed one in *out.  [call] */
  qm_status (*finalize)(qm_call*, const qm_reparam_info*, const qm_tensor* weight,
                        const qm_named_tensor* params, uint64_t param_count,
                        qm_packed* out) QM_NOEXCEPT;
  /* Minor 1, optional, INPUT and DELTA: the parameters as an adapter of another tool.  target
   * "peft": *config_json gets the object of adapter_config.json (static or in scratch) as far as
   * the options say it; the host adds the base model and the target modules, and stores parameter
   * NAME of a linear as base_model.model.LINEAR.NAME.weight.  [call] */
  qm_status (*to_adapter)(qm_call*, const char* target, const char** config_json) QM_NOEXCEPT;
  /* The way back: *options_json gets an object of option texts with which this method runs an
   * adapter of that config; options it leaves out have their defaults.  QM_UNIMPLEMENTED: it is not
   * one of this method.  [call] */
  qm_status (*from_adapter)(qm_call*, const char* target, const char* config_json,
                            const char** options_json) QM_NOEXCEPT;
} qm_reparametrize;

#ifdef __cplusplus
}
#endif
#endif /* QUANTMILL_REPARAMETRIZE_H_ */
