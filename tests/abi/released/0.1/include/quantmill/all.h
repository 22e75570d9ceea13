/* Every stable header of the plugin ABI.  Drafts are not included. */
#ifndef QUANTMILL_ALL_H_
#define QUANTMILL_ALL_H_

#include "quantmill/block_transform.h"
#include "quantmill/block_tune.h"
#include "quantmill/format.h"
#include "quantmill/host_ext.h"
#include "quantmill/linear_kernel.h"
#include "quantmill/plugin.h"
#include "quantmill/quantize_linear.h"
#include "quantmill/reparametrize.h"

#endif /* QUANTMILL_ALL_H_ */
