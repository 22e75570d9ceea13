/* Capability qm.block-tune/1: tune the continuous parts (scales, zeros, codebooks) of the packed
 * slots and norms of one block through the host's vjp.  Packed stays packed. */
#ifndef QUANTMILL_BLOCK_TUNE_H_
#define QUANTMILL_BLOCK_TUNE_H_

#include "quantmill/block_transform.h"
#include "quantmill/plugin.h"

#ifdef __cplusplus
extern "C" {
#endif

#define QM_EXT_BLOCK_TUNE "qm.block-tune/1"

typedef struct qm_block_tune { /* GROWABLE table */
  uint64_t struct_size;
  /* From shapes and options alone; format_id of the plan stays NULL.  [call] */
  qm_status (*plan)(qm_call*, const qm_block_info*, qm_quant_plan* out) QM_NOEXCEPT;
  /* packed: one per linear of the block, format_id NULL where the slot is dense.  New contents go
   * out through emit(item = linear index, name of the format's tensor); norms and other dense
   * tensors through *edits (QM_EDIT_REPLACE, array in scratch).  [call] */
  qm_status (*run)(qm_call*, const qm_block_info*, const qm_packed* packed, const qm_edit** edits,
                   uint64_t* edit_count) QM_NOEXCEPT;
} qm_block_tune;

#ifdef __cplusplus
}
#endif
#endif /* QUANTMILL_BLOCK_TUNE_H_ */
