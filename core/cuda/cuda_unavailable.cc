// Stands in for the CUDA backend in a build without CUDA.
#include <memory>

#include "core/base/status.h"
#include "core/tensor/backend.h"

namespace quantmill {

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(int index, DType /*activation*/,
                                                         int /*threads*/) {
  return absl::UnavailableError(ErrorText(
      absl::StrCat("cannot use device cuda:", index), "this build of quantmill has no CUDA",
      "use --device cpu, or build with a CUDA toolkit and -DQM_CUDA=ON"));
}

}  // namespace quantmill
