// The target "gguf". Apart from affine.h, so that the kernels do not depend on it.
#ifndef QUANTMILL_PLUGINS_AFFINE_AFFINE_GGUF_H_
#define QUANTMILL_PLUGINS_AFFINE_AFFINE_GGUF_H_

#include <iterator>
#include <string>

#include "affine.h"

namespace affine {

// Those of affine.h and this one.
inline constexpr const char* kAllTargets[] = {kTargets[0], kTargets[1], kTargets[2],
                                              kTargets[3], kTargets[4], "gguf"};
static_assert(std::size(kAllTargets) == std::size(kTargets) + 1);

qm_status GgufStorable(qm_call* call, const Params& params, int64_t in);
qm_status ToGguf(qm_call* call, const char* layer, const Weight& weight, Emitter* emitter,
                 std::string* config);
qm_status FromGguf(qm_call* call, const char* layer, const qm_named_tensor* tensors, uint64_t count,
                   const char* config_json, qm_packed* out);

}  // namespace affine

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_GGUF_H_
