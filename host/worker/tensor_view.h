// Tensors that come from the other side of the ABI.
#ifndef QUANTMILL_HOST_WORKER_TENSOR_VIEW_H_
#define QUANTMILL_HOST_WORKER_TENSOR_VIEW_H_

#include "absl/status/statusor.h"
#include "core/tensor/tensor.h"
#include "quantmill/plugin.h"

namespace quantmill {

// A handle on a plugin's memory, valid while that is: contiguous, of a known dtype, on the host or
// on `device`. INVALID_ARGUMENT says what is wrong.
absl::StatusOr<Tensor> BorrowTensor(const qm_tensor& view, Device device);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_WORKER_TENSOR_VIEW_H_
