/* Capability qm.block-transform/1: propose edits to a block; the host applies, checks and journals
 * them. */
#ifndef QUANTMILL_BLOCK_TRANSFORM_H_
#define QUANTMILL_BLOCK_TRANSFORM_H_

#include "quantmill/plugin.h"
#include "quantmill/quantize_linear.h"

#ifdef __cplusplus
extern "C" {
#endif

#define QM_EXT_BLOCK_TRANSFORM "qm.block-transform/1"

/* One reader of a site's channels.  With grouped-query attention the 128 value channels feed the
 * 384 inputs of o_proj: channel_map says which channel each input comes from. */
typedef struct qm_site_consumer { /* FROZEN */
  const char* name;               /* module name, e.g. "model.layers.3.self_attn.o_proj" */
  const int32_t* channel_map;     /* in_features entries; NULL = identity */
  int64_t in_features;            /* inputs of this reader */
  uint64_t flags;                 /* QM_CONSUMER_* */
} qm_site_consumer;
/* Not a slot (the router of a mixture of experts): never packed, but rescaled by the host too. */
#define QM_CONSUMER_NOT_A_SLOT (UINT64_C(1) << 0)

typedef struct qm_scale_site { /* FROZEN: a place where channels may be rescaled without effect */
  const char* id;              /* the producer's name: a producer has one site */
  /* module name: a norm, or a linear whose output channels feed the consumers; it is a norm iff no
   * linear of the block has this name */
  const char* producer;
  const qm_site_consumer* consumers; /* every reader of the channels */
  uint64_t consumer_count;           /* entries of consumers */
  int64_t channels;                  /* of the producer */
  uint64_t flags;                    /* QM_SITE_* */
} qm_scale_site;
/* flags >> 32 is then the width of a head: a rotation mixes the channels of one head only and is 0
 * outside its diagonal blocks. */
#define QM_SITE_ROTATABLE (UINT64_C(1) << 0)

/* How a linear will be rounded by the next packing stage on it; bits 0 = by none. */
typedef struct qm_next_rounding { /* FROZEN */
  int32_t bits;                   /* of a code; 0 = stays dense */
  int32_t symmetric;              /* 1: zero point fixed at 2^(bits-1) */
  int64_t group_size;             /* -1 = per output channel */
} qm_next_rounding;

typedef int32_t qm_edit_kind;
enum {
  QM_EDIT_SCALE = 1,  /* target = site id; value = f32[channels]: producer / s, consumers * s;
                         preserves the function */
  QM_EDIT_ROTATE = 2, /* target = site id; value = f32[channels, channels] orthogonal Q: the
                         producer's output y (a row) becomes y Q, consumers W become W Q; preserves
                         the function */
  QM_EDIT_CLIP = 3,   /* target = linear; value = f32[out, groups] max |w|; changes the function */
  QM_EDIT_REPLACE = 4 /* target = tensor; value = new content; changes the function */
};
typedef struct qm_edit { /* FROZEN */
  const char* target;    /* site, linear or tensor, by kind */
  qm_tensor value;       /* by kind; in scratch */
  qm_edit_kind kind;     /* QM_EDIT_* */
  int32_t reserved;      /* zero */
} qm_edit;

/* The linears of a block that the stage's `layers` name, and the sites whose producer (if it is a
 * linear) and consumers are all among them. */
typedef struct qm_block_info { /* GROWABLE */
  uint64_t struct_size;
  const char* name;                     /* "model.layers.3" */
  const qm_linear_info* const* linears; /* the linears of the block */
  /* One per linear, read-only, f32 [out, in] on call->device, with all edits so far; NULL in
   * plan. */
  const qm_tensor* weights;
  const qm_next_rounding* next_roundings; /* one per linear */
  uint64_t linear_count;                  /* entries of linears, weights and next_roundings */
  const qm_scale_site* sites;             /* places where channels may be rescaled */
  uint64_t site_count;                    /* entries of sites */
} qm_block_info;

typedef struct qm_block_transform { /* GROWABLE table */
  uint64_t struct_size;
  /* From shapes and options alone; format_id of the plan stays NULL.  Statistics are measured on
   * the inputs of every linear listed.  [call] */
  qm_status (*plan)(qm_call*, const qm_block_info*, qm_quant_plan* out) QM_NOEXCEPT;
  /* *edits: array in scratch, applied in order.  The host checks targets, shapes and values, and
   * that what preserves the function does so (the halves of the block, run in f32, differ by less
   * than 1e-5); an edit that fails leaves the block as it was and fails the call.  [call] */
  qm_status (*run)(qm_call*, const qm_block_info*, const qm_stats* const* per_linear,
                   const qm_edit** edits, uint64_t* edit_count) QM_NOEXCEPT;
} qm_block_transform;

#ifdef __cplusplus
}
#endif
#endif /* QUANTMILL_BLOCK_TRANSFORM_H_ */
