/* Capability qm.quantize-linear/1: turn dense linears into packed ones. */
#ifndef QUANTMILL_QUANTIZE_LINEAR_H_
#define QUANTMILL_QUANTIZE_LINEAR_H_

#include "quantmill/plugin.h"

#ifdef __cplusplus
extern "C" {
#endif

#define QM_EXT_QUANTIZE_LINEAR "qm.quantize-linear/1"

/* Names and numerics of statistics: STATS.md. */
#define QM_STAT_HESSIAN "hessian" /* f32 [in, in]: sum over rows of x x^T */
#define QM_STAT_CROSS "cross"     /* f32 [in, in]: sum over rows of (x_original - x) x^T */
#define QM_STAT_ABSMEAN "absmean" /* f32 [in]: mean over rows of |x| */
#define QM_STAT_ABSMAX "absmax"   /* f32 [in]: max over rows of |x| */
#define QM_STAT_ROWS "rows"       /* f32 [n, in], n <= max_rows: evenly strided input rows */

typedef struct qm_stat_request { /* FROZEN */
  const char* stat_id;           /* QM_STAT_HESSIAN, ... */
  int64_t max_rows;              /* for "rows"; else 0 */
  qm_dtype dtype;                /* QM_F32 for all statistics of minor 0 */
  uint32_t flags;                /* QM_STAT_* */
} qm_stat_request;
#define QM_STAT_OPTIONAL 1u /* absent from qm_stats when the host cannot offer it */
#define QM_STAT_FROM_ORIGINAL                                         \
  2u /* inputs of the untouched model, not of the part already packed \
      */

typedef struct qm_linear_info { /* GROWABLE */
  uint64_t struct_size;
  const char* name;     /* "model.layers.3.mlp.down_proj" */
  const char* role;     /* "attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down",
                           "expert.gate", "expert.up", "expert.down", "head", "embedding" or "" */
  int64_t out_features; /* rows of the weight */
  int64_t in_features;  /* columns */
  qm_dtype weight_dtype; /* as stored in the checkpoint */
  int32_t input_group;   /* equal for linears of one block fed by the same activation */
  /* F16, BF16 or F32: the type in which the export target stores scales.  Emit them in it, and
   * round a scale to it before choosing codes, so that what is stored is what was optimised. */
  qm_dtype scale_dtype;
  int32_t reserved; /* zero */
} qm_linear_info;

typedef struct qm_quant_plan { /* GROWABLE, filled by the plugin */
  uint64_t struct_size;
  const qm_stat_request* stats;  /* static or in scratch; the host copies before closing the call */
  uint64_t stat_count;           /* entries of stats */
  uint64_t scratch_bytes;        /* peak upper bound for one linear; 0 = unknown */
  uint64_t scratch_bytes_shared; /* part of scratch_bytes that one group call needs only once */
  const char* format_id;         /* what it will emit */
  double flops; /* estimate for one linear, for the host's time estimate; 0 = unknown */
  /* Minor 1: the parameters that run will emit, canonical JSON, static or in scratch; NULL = not
   * known before.  With it the host can ask whether the export target holds them. */
  const char* format_json;
  /* Minor 1: all bits that will be emitted, over the weights; 0 = unknown. */
  double bits_per_weight;
} qm_quant_plan;

typedef struct qm_stats { /* GROWABLE */
  uint64_t struct_size;
  const qm_named_tensor* items; /* name = stat_id; absent if optional and not available */
  uint64_t count;               /* entries of items */
  int64_t row_count;            /* activation rows seen; may be 0 (an expert nobody visited) */
} qm_stats;

typedef struct qm_quantize_linear { /* GROWABLE table: append only */
  uint64_t struct_size;
  /* From shapes and options alone: statistics wanted, scratch bound, format.  Refuses what run
   * would refuse (a group size that does not divide).  [call] */
  qm_status (*plan)(qm_call*, const qm_linear_info*, qm_quant_plan* out) QM_NOEXCEPT;
  /* weight: [out, in], read-only, f32 on call->device.  Emits the tensors of the format with
   * item 0 and fills *out, whose arrays may live in scratch.  row_count 0 must give a defined
   * result or QM_FAILED_PRECONDITION.  [call] */
  qm_status (*run)(qm_call*, const qm_linear_info*, const qm_tensor* weight, const qm_stats*,
                   qm_packed* out) QM_NOEXCEPT;
  /* Optional.  All linears that share one input (q/k/v, gate/up) in one call, so that one
   * factorization serves them: every stats[i]->items points at the same tensors when the
   * input_group is equal.  Results must equal those of `run` on each.  [call] */
  qm_status (*run_group)(qm_call*, uint64_t count, const qm_linear_info* const* infos,
                         const qm_tensor* weights, const qm_stats* const* stats,
                         qm_packed* out) QM_NOEXCEPT;
} qm_quantize_linear;

#ifdef __cplusplus
}
#endif
#endif /* QUANTMILL_QUANTIZE_LINEAR_H_ */
