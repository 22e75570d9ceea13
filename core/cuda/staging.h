// Copies between pageable host memory (a mapped file, a std::vector) and the device.
#ifndef QUANTMILL_CORE_CUDA_STAGING_H_
#define QUANTMILL_CORE_CUDA_STAGING_H_

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/threads/thread_pool.h"

namespace quantmill::cuda {

// Two pinned buffers used in turn: while one is on its way to or from the device, the host fills or
// empties the other. Used from one thread at a time.
class Staging {
 public:
  // `stream` and `threads` must outlive the result.
  static absl::StatusOr<std::unique_ptr<Staging>> Create(cudaStream_t stream, ThreadPool* threads);
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  // Queues the copy; `source` may be changed or freed after return.
  absl::Status ToDevice(const void* source, void* target, int64_t bytes);
  // Queues the copy of `count` items of `item_bytes` (at most kBufferBytes) made by fill(first,
  // count, where), which writes `count` items from number `first` on.
  using Fill = std::function<void(int64_t first, int64_t count, char* where)>;
  absl::Status ToDevice(int64_t count, int64_t item_bytes, const Fill& fill, void* target);
  // Done on return.
  absl::Status ToHost(const void* source, void* target, int64_t bytes);

  static constexpr int64_t kBufferBytes = int64_t{8} << 20;

 private:
  struct Buffer {
    char* data = nullptr;
    cudaEvent_t free = nullptr;  // recorded behind the last copy that uses the buffer
  };
  Staging(cudaStream_t stream, ThreadPool* threads) : stream_(stream), threads_(threads) {}
  absl::Status Open();
  void HostCopy(char* target, const char* source, int64_t bytes);

  const cudaStream_t stream_;
  ThreadPool* const threads_;
  std::array<Buffer, 2> buffers_;
  size_t next_ = 0;
};

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_CUDA_STAGING_H_
