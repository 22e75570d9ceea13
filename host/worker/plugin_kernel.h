// A PackedKernel over a plugin's qm.linear-kernel/1.
#ifndef QUANTMILL_HOST_WORKER_PLUGIN_KERNEL_H_
#define QUANTMILL_HOST_WORKER_PLUGIN_KERNEL_H_

#include <memory>

#include "core/formats/packed.h"
#include "host/plugins/registry.h"
#include "host/worker/call_watch.h"

namespace quantmill {

// `method` has a qm.linear-kernel/1 table with at least accepts and dequantize. `watch` may be
// null; it and `backend` must outlive the kernel.
std::shared_ptr<PackedKernel> MakePluginKernel(const LoadedMethod& method, Backend& backend,
                                               CallWatch* watch);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_WORKER_PLUGIN_KERNEL_H_
