#include "core/cuda/cuda_backend.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/cuda/convert.cuh"
#include "core/cuda/cuda_status.h"

namespace quantmill::cuda {
namespace {

constexpr int kOldestSm = 80;  // the tensor-core kernels use mma.m16n8k16 and cp.async

absl::Status Unavailable(int index, absl::string_view why, absl::string_view remedy) {
  return absl::UnavailableError(
      ErrorText(absl::StrCat("cannot use device cuda:", index), why, remedy));
}

absl::Status CheckDevice(int index, int* sm) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    cudaGetLastError();
    return Unavailable(index,
                       error == cudaSuccess
                           ? "this machine has no NVIDIA GPU"
                           : absl::StrCat("no usable NVIDIA GPU: ", cudaGetErrorString(error)),
                       "use --device cpu, or check the driver with nvidia-smi");
  }
  if (index < 0 || index >= count) {
    return Unavailable(index, absl::StrCat("this machine has ", count, " GPU(s)"),
                       absl::StrCat("use cuda:0 to cuda:", count - 1));
  }
  cudaDeviceProp properties;
  QM_CUDA_RETURN(cudaGetDeviceProperties(&properties, index));
  *sm = 10 * properties.major + properties.minor;
  if (*sm < kOldestSm) {
    return Unavailable(index,
                       absl::StrCat(properties.name, " has compute capability ", properties.major,
                                    ".", properties.minor, ", and 8.0 is needed"),
                       "use --device cpu");
  }
  return absl::OkStatus();
}

}  // namespace

CudaBackend::CudaBackend(int index, DType activation, int threads)
    : device_{QM_CUDA, index}, activation_(activation), threads_(threads) {}

CudaBackend::~CudaBackend() {
  // A device that was never opened may not exist: asking for it would leave an error behind that
  // the next launch anywhere in the process would be blamed for.
  if (memory_ == nullptr) return;
  cudaSetDevice(device_.index);
  if (solver_params_ != nullptr) cusolverDnDestroyParams(solver_params_);
  if (solver_ != nullptr) cusolverDnDestroy(solver_);
}

absl::StatusOr<std::unique_ptr<CudaBackend>> CudaBackend::Create(int index, DType activation,
                                                                 int threads) {
  if (!IsModelFloat(activation)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "activations cannot be ", AbslView(DTypeName(activation)), "; use F32, F16 or BF16"));
  }
  std::unique_ptr<CudaBackend> backend(new CudaBackend(index, activation, threads));
  QM_RETURN_IF_ERROR(backend->Open());
  return backend;
}

absl::Status CudaBackend::Open() {
  QM_RETURN_IF_ERROR(CheckDevice(device_.index, &sm_));
  QM_RETURN_IF_ERROR(Enter());
  if (ProbeKernelImage() != cudaSuccess) {
    cudaGetLastError();
    return Unavailable(device_.index,
                       absl::StrCat("this build holds no kernels for compute capability ", sm_ / 10,
                                    ".", sm_ % 10),
                       "build with its architecture in QM_CUDA_ARCHITECTURES");
  }
  QM_ASSIGN_OR_RETURN(memory_, DeviceMemory::Create(device_.index));
  QM_ASSIGN_OR_RETURN(staging_, Staging::Create(work(), &threads_));
  QM_ASSIGN_OR_RETURN(std::shared_ptr<void> workspace,
                      memory_->Allocate(MatrixProducts::kWorkspaceBytes));
  QM_ASSIGN_OR_RETURN(products_, MatrixProducts::Create(work(), std::move(workspace)));
  return absl::OkStatus();
}

absl::Status CudaBackend::Enter() const {
  QM_CUDA_RETURN(cudaSetDevice(device_.index));
  return absl::OkStatus();
}

}  // namespace quantmill::cuda

namespace quantmill {

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(int index, DType activation, int threads) {
  QM_ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend,
                      cuda::CudaBackend::Create(index, activation, threads));
  return backend;
}

}  // namespace quantmill
