#include "core/cuda/device_memory.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/cuda/cuda_status.h"

namespace quantmill::cuda {
namespace {

constexpr int64_t kAlignment = 256;  // what the plugin ABI promises

}  // namespace

absl::StatusOr<std::shared_ptr<DeviceMemory>> DeviceMemory::Create(int device) {
  std::shared_ptr<DeviceMemory> memory(new DeviceMemory(device));
  QM_RETURN_IF_ERROR(memory->Open());
  return memory;
}

absl::Status DeviceMemory::Open() {
  QM_CUDA_RETURN(cudaSetDevice(device_));
  QM_CUDA_RETURN(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  size_t free = 0;
  size_t total = 0;
  QM_CUDA_RETURN(cudaMemGetInfo(&free, &total));
  total_ = static_cast<int64_t>(total);
  cudaMemPoolProps properties = {};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device_;
  QM_CUDA_RETURN(cudaMemPoolCreate(&pool_, &properties));
  // Keep freed memory for the next call: the decoder allocates the same sizes block after block.
  uint64_t threshold = UINT64_MAX;
  QM_CUDA_RETURN(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &threshold));
  return absl::OkStatus();
}

DeviceMemory::~DeviceMemory() {
  cudaSetDevice(device_);
  if (stream_ != nullptr) cudaStreamSynchronize(stream_);
  if (pool_ != nullptr) cudaMemPoolDestroy(pool_);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

absl::StatusOr<std::shared_ptr<void>> DeviceMemory::Allocate(int64_t bytes) {
  const int64_t rounded = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (rounded > total_) return OutOfMemory(rounded);
  void* data = nullptr;
  cudaError_t error = cudaMallocFromPoolAsync(&data, static_cast<size_t>(rounded), pool_, stream_);
  if (error == cudaErrorMemoryAllocation) {
    // Freed blocks of other sizes may fill the pool; give them back to the device and try again.
    cudaGetLastError();
    QM_CUDA_RETURN(cudaStreamSynchronize(stream_));
    QM_CUDA_RETURN(cudaMemPoolTrimTo(pool_, 0));
    error = cudaMallocFromPoolAsync(&data, static_cast<size_t>(rounded), pool_, stream_);
    if (error == cudaErrorMemoryAllocation) return OutOfMemory(rounded);
  }
  QM_CUDA_RETURN(error);
  used_ += rounded;
  peak_ = std::max(peak_, used_.load());
  return std::shared_ptr<void>(
      data, [self = shared_from_this(), rounded](void* p) { self->Release(p, rounded); });
}

void DeviceMemory::Release(void* data, int64_t bytes) {
  // An error here means a lost context, which the next call reports.
  cudaFreeAsync(data, stream_);
  used_ -= bytes;
}

absl::Status DeviceMemory::OutOfMemory(int64_t bytes) const {
  cudaGetLastError();
  size_t free = 0;
  size_t total = 0;
  QM_CUDA_RETURN(cudaMemGetInfo(&free, &total));
  return absl::ResourceExhaustedError(ErrorText(
      absl::StrCat("cannot allocate ", bytes, " bytes on cuda:", device_),
      absl::StrCat(free, " of ", total, " bytes are free and this process holds ", used_.load()),
      "use fewer or shorter windows, stop other programs on this GPU, or use --device cpu"));
}

}  // namespace quantmill::cuda
