// The linears of an original checkpoint, quantized block by block while they are loaded: nothing is
// written, and no more than a block is in memory dense.
#ifndef QUANTMILL_HOST_RUN_QUANTIZE_ON_LOAD_H_
#define QUANTMILL_HOST_RUN_QUANTIZE_ON_LOAD_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "core/checkpoint/open_model.h"
#include "core/model/weights.h"
#include "host/plugins/registry.h"
#include "host/worker/call.h"
#include "host/worker/formats.h"

namespace quantmill {

// Every linear in the blocks is quantized with `method` and these options; the head stays as it is.
// `method` must need no statistics: FAILED_PRECONDITION names what it asks for. Refusals of plan()
// come before this returns, those of run() from LoadBlock. Calls are made in this process.
// backend and formats must outlive the result, which loads to that backend only.
absl::StatusOr<std::unique_ptr<WeightSource>> QuantizeOnLoad(const std::string& directory,
                                                             const LoadedMethod& method,
                                                             const ResolvedOptions& options,
                                                             PluginFormats& formats,
                                                             Backend& backend, PackedMode mode);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_QUANTIZE_ON_LOAD_H_
