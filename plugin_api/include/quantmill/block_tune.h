/* Capability qm.block-tune/1: tune the continuous parts (scales, zeros, codebooks) of the packed
 * slots and norms of one block through the host's vjp.  Packed stays packed.
 *
 * A method that offers it beside qm.quantize-linear/1 is asked, once per block, after its stage
 * has packed the block's slots.  It works on f32 values of its own: it makes the dense weight of a
 * packed slot from the values (codes stay fixed), gives it to forward and vjp of qm.host.block/1 as
 * an override of "<linear>.weight", compares with forward without overrides (the dense block on the
 * same inputs), carries the gradient of the weight on to its values, and emits them at the end. */
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
  /* From shapes and options alone: scratch_bytes and flops of one run; format_id and statistics
   * stay as they are.  linears: those of the block that the stage's `layers` name; no weights,
   * roundings or sites.  QM_UNIMPLEMENTED (with any text): these options want no tuning; no error,
   * and run is not called.  Where tuning is wanted the host refuses options that differ within a
   * block, blocks with a mixture of experts, and a pipeline without calibration text.  [call] */
  qm_status (*plan)(qm_call*, const qm_block_info*, qm_quant_plan* out) QM_NOEXCEPT;
  /* linears as in plan, with their dense weights as they were before packing; no roundings, no
   * sites.  packed: read-only, on call->device, one per linear, with format_id NULL where the slot
   * was left dense or packed by the stage's fallback; and one more behind them without a format,
   * whose tensors are the block's norms and biases, f32, by full name.  New contents go out through
   * emit(item = index of the linear, name of the format's tensor), with the dtype and shape of the
   * tensor they replace; what is not emitted stays, and so do format_id and format_json.  Norms and
   * biases go out through *edits (QM_EDIT_REPLACE, values f32, array in scratch), rounded by the
   * host to their stored dtype; weights cannot be replaced.  A failure leaves the block as packed,
   * under the stage's on_error; the host compares the block's output before and after, and a tuning
   * that makes it worse is dropped.  [call] */
  qm_status (*run)(qm_call*, const qm_block_info*, const qm_packed* packed, const qm_edit** edits,
                   uint64_t* edit_count) QM_NOEXCEPT;
} qm_block_tune;

#ifdef __cplusplus
}
#endif
#endif /* QUANTMILL_BLOCK_TUNE_H_ */
