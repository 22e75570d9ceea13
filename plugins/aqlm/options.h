// The options of this plugin, read from a call.
#ifndef QUANTMILL_PLUGINS_AQLM_OPTIONS_H_
#define QUANTMILL_PLUGINS_AQLM_OPTIONS_H_

#include <memory>

#include "solver.h"

namespace quantmill::aqlm {

// Options for one linear; INVALID_ARGUMENT says what does not fit it.
qm_status ReadOptions(qm_call* call, const qm_linear_info& info, Options* out);
// Array operations for the device of the call. `options` must outlive them.
qm_status MakeKernels(qm_call* call, const Options& options, std::unique_ptr<Kernels>* out);

}  // namespace quantmill::aqlm

#endif  // QUANTMILL_PLUGINS_AQLM_OPTIONS_H_
