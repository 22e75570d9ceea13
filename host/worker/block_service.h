// qm.host.block/1: trial runs of the block that a transform works on.
#ifndef QUANTMILL_HOST_WORKER_BLOCK_SERVICE_H_
#define QUANTMILL_HOST_WORKER_BLOCK_SERVICE_H_

#include "quantmill/all.h"

namespace quantmill {

// Works on CallContext::block, which must not be null.
const qm_host_block* BlockServiceTable();

}  // namespace quantmill

#endif  // QUANTMILL_HOST_WORKER_BLOCK_SERVICE_H_
