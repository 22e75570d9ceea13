#include "core/cuda/cuda_error.h"

#include "absl/strings/match.h"

namespace quantmill {

bool IsStickyCudaError(const absl::Status& status) {
  return status.code() == absl::StatusCode::kDataLoss &&
         absl::StrContains(status.message(), "CUDA");
}

}  // namespace quantmill
