// Stream-ordered device memory with caching and a count of what is in use.
#ifndef QUANTMILL_CORE_CUDA_DEVICE_MEMORY_H_
#define QUANTMILL_CORE_CUDA_DEVICE_MEMORY_H_

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"

namespace quantmill::cuda {

// Owns the stream of all work and a pool of memory that follows it: a block freed by the host is
// given out again only to work queued later on the stream, so nothing waits. Blocks hold a share of
// this object; it may be dropped in any order with them. Allocate() from one thread at a time;
// blocks may be released on any thread.
class DeviceMemory : public std::enable_shared_from_this<DeviceMemory> {
 public:
  static absl::StatusOr<std::shared_ptr<DeviceMemory>> Create(int device);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  // 256-byte aligned, content undefined, never null (also for 0 bytes). RESOURCE_EXHAUSTED names
  // the bytes asked for and the bytes free.
  absl::StatusOr<std::shared_ptr<void>> Allocate(int64_t bytes);

  cudaStream_t stream() const { return stream_; }
  int64_t peak_bytes() const { return peak_; }

 private:
  explicit DeviceMemory(int device) : device_(device) {}
  absl::Status Open();
  absl::Status OutOfMemory(int64_t bytes) const;
  void Release(void* data, int64_t bytes);

  const int device_;
  cudaStream_t stream_ = nullptr;
  cudaMemPool_t pool_ = nullptr;
  int64_t total_ = 0;  // bytes on the device
  std::atomic<int64_t> used_ = 0;
  int64_t peak_ = 0;
};

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_CUDA_DEVICE_MEMORY_H_
