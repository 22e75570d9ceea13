// What int8-row and float8 share: a tensor of codes in the shape of the weight, and scales.
#ifndef QUANTMILL_CORE_FORMATS_ROW_PARTS_H_
#define QUANTMILL_CORE_FORMATS_ROW_PARTS_H_

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/formats/packed.h"

namespace quantmill {

struct RowParts {
  const Tensor* codes;  // [out, in]
  const Tensor* scale;  // [out] or [1]
};

// The two tensors of `weight`, which must be all it has: codes of `dtype`, `scales` scales that are
// F16, BF16 or F32, positive and finite; on the host. INVALID_ARGUMENT otherwise.
absl::StatusOr<RowParts> FindRowParts(const PackedWeight& weight, DType dtype, int64_t scales);

// F32, F16 or BF16 [out, in] on the host, or INVALID_ARGUMENT.
absl::Status CheckDenseTarget(const PackedWeight& weight, const Tensor& out);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_FORMATS_ROW_PARTS_H_
