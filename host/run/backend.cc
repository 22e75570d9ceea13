#include "host/run/backend.h"

#include "core/base/status.h"
#include "host/pipeline/device.h"

namespace quantmill {

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const std::string& device,
                                                     std::optional<DType> dtype) {
  QM_ASSIGN_OR_RETURN(const DeviceChoice choice, ParseDevice(device));
  if (choice.kind == DeviceChoice::Kind::kCpu) return MakeCpuBackend();
#if QM_WITH_CUDA
  absl::StatusOr<std::unique_ptr<Backend>> cuda =
      MakeCudaBackend(choice.index, dtype.value_or(DType::kBF16));
  if (cuda.ok() || choice.kind == DeviceChoice::Kind::kCuda) return cuda;
  if (!absl::IsUnavailable(cuda.status())) return cuda.status();
  return MakeCpuBackend();
#else
  (void)dtype;
  if (choice.kind == DeviceChoice::Kind::kAuto) return MakeCpuBackend();
  return absl::UnavailableError(ErrorText("this build has no CUDA", "", "use --device cpu"));
#endif
}

}  // namespace quantmill
