#include "host/run/backend.h"

#include <fstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/threads/thread_pool.h"
#include "host/pipeline/device.h"
#if QM_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace quantmill {
namespace {

std::string ProcessorName() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(": ");
    if (absl::StartsWith(line, "model name") && colon != std::string::npos) {
      return line.substr(colon + 2);
    }
  }
  return "unknown";
}

void AddGpu(int index, DeviceFacts* facts) {
#if QM_WITH_CUDA
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, index) == cudaSuccess) facts->gpu = properties.name;
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess) {
    facts->driver = absl::StrCat(version / 1000, ".", version % 1000 / 10);
  }
#else
  (void)index;
  (void)facts;
#endif
}

}  // namespace

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

DeviceFacts FactsOf(Backend& backend) {
  DeviceFacts facts;
  facts.device = DeviceName(backend.device());
  facts.processor = ProcessorName();
  facts.threads = backend.threads().size();
  if (backend.device().is_cuda()) AddGpu(backend.device().index, &facts);
  return facts;
}

}  // namespace quantmill
