// A packed weight as the forward pass wants it.
#ifndef QUANTMILL_CORE_CHECKPOINT_PACKED_LINEAR_H_
#define QUANTMILL_CORE_CHECKPOINT_PACKED_LINEAR_H_

#include "absl/status/statusor.h"
#include "core/checkpoint/open_model.h"
#include "core/formats/packed.h"
#include "core/model/weights.h"

namespace quantmill {

// A linear (without bias) on the backend of a packed weight on the host. `registry` may be null:
// then the reference kernel serves.
absl::StatusOr<LinearWeight> MakePackedLinear(PackedWeight weight, PackedMode mode,
                                              FormatRegistry* registry, Backend& backend);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_CHECKPOINT_PACKED_LINEAR_H_
