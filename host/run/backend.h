// The backend a device name stands for.
#ifndef QUANTMILL_HOST_RUN_BACKEND_H_
#define QUANTMILL_HOST_RUN_BACKEND_H_

#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "core/tensor/backend.h"

namespace quantmill {

// device: auto (the first GPU, else the CPU), cpu, cuda, cuda:N. dtype: compute type; the CPU
// computes in F32 whatever is asked; CUDA in BF16 by default.
absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const std::string& device,
                                                     std::optional<DType> dtype);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_BACKEND_H_
