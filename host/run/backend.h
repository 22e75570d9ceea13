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

// What a measurement ran on.
struct DeviceFacts {
  std::string device;     // "cpu", "cuda:0"
  std::string processor;  // of the host
  int threads = 0;        // of the host's pool
  std::string gpu;        // its name; empty on the CPU
  std::string driver;     // the CUDA version its driver supports, "13.0"; empty on the CPU
};
DeviceFacts FactsOf(Backend& backend);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_RUN_BACKEND_H_
