// qm.block-tune/1 of this plugin; tune.cc.
#ifndef QUANTMILL_PLUGINS_AQLM_TUNE_H_
#define QUANTMILL_PLUGINS_AQLM_TUNE_H_

#include "quantmill/all.h"

namespace quantmill::aqlm {

struct BlockTuner {
  // UNIMPLEMENTED, which is no error, unless the option `tune` is set.
  static qm_status Plan(qm_call* call, const qm_block_info& info, qm_quant_plan* out);
  static qm_status Run(qm_call* call, const qm_block_info& info, const qm_packed* packed,
                       const qm_edit** edits, uint64_t* edit_count);
};

}  // namespace quantmill::aqlm

#endif  // QUANTMILL_PLUGINS_AQLM_TUNE_H_
