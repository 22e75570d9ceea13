#include "host/worker/tensor_view.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "core/base/status.h"

namespace quantmill {

absl::StatusOr<Tensor> BorrowTensor(const qm_tensor& view, Device device) {
  if (view.rank < 0 || view.rank > QM_MAX_RANK) {
    return absl::InvalidArgumentError(absl::StrCat("a tensor of rank ", view.rank));
  }
  const bool known = (view.dtype >= QM_F32 && view.dtype <= QM_F8_E5M2) ||
                     (view.dtype >= QM_I8 && view.dtype <= QM_I64);
  if (!known) return absl::InvalidArgumentError(absl::StrCat("unknown dtype ", view.dtype));
  const Device where{view.device.kind, view.device.index};
  if (!where.is_cpu() && !(where == device)) {
    return absl::InvalidArgumentError(absl::StrCat("a tensor on ", DeviceName(where),
                                                   "; the call works on ", DeviceName(device)));
  }
  int64_t elements = 1;
  for (int axis = view.rank - 1; axis >= 0; --axis) {
    if (view.shape[axis] < 0) return absl::InvalidArgumentError("a negative extent");
    if (view.shape[axis] > 1 && view.stride[axis] != elements) {
      return absl::InvalidArgumentError("a tensor that is not contiguous; pass a copy");
    }
    if (__builtin_mul_overflow(elements, view.shape[axis], &elements)) {
      return absl::InvalidArgumentError("a tensor larger than any memory");
    }
  }
  if (view.data == nullptr && elements > 0) return absl::InvalidArgumentError("a null tensor");
  return Tensor(nullptr, view.data, static_cast<DType>(view.dtype),
                Shape(absl::Span<const int64_t>(view.shape, static_cast<size_t>(view.rank))),
                where.is_cpu() ? Device{} : device, /*read_only=*/true);
}

}  // namespace quantmill
