#include "core/cuda/staging.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/cuda/cuda_status.h"

namespace quantmill::cuda {
namespace {

// Bytes one thread copies at a time: several threads also wait for the page faults of a mapped file
// at once.
constexpr int64_t kHostGrain = int64_t{1} << 20;

}  // namespace

absl::StatusOr<std::unique_ptr<Staging>> Staging::Create(cudaStream_t stream, ThreadPool* threads) {
  std::unique_ptr<Staging> staging(new Staging(stream, threads));
  QM_RETURN_IF_ERROR(staging->Open());
  return staging;
}

absl::Status Staging::Open() {
  for (Buffer& buffer : buffers_) {
    QM_CUDA_RETURN(cudaMallocHost(reinterpret_cast<void**>(&buffer.data), kBufferBytes));
    QM_CUDA_RETURN(cudaEventCreateWithFlags(&buffer.free, cudaEventDisableTiming));
  }
  return absl::OkStatus();
}

Staging::~Staging() {
  cudaStreamSynchronize(stream_);
  for (Buffer& buffer : buffers_) {
    if (buffer.free != nullptr) cudaEventDestroy(buffer.free);
    if (buffer.data != nullptr) cudaFreeHost(buffer.data);
  }
}

void Staging::HostCopy(char* target, const char* source, int64_t bytes) {
  threads_->ParallelFor(bytes, kHostGrain, [&](int64_t begin, int64_t end, int /*worker*/) {
    std::memcpy(target + begin, source + begin, static_cast<size_t>(end - begin));
  });
}

absl::Status Staging::ToDevice(const void* source, void* target, int64_t bytes) {
  const char* from = static_cast<const char*>(source);
  return ToDevice(
      bytes, 1,
      [&](int64_t first, int64_t count, char* where) { HostCopy(where, from + first, count); },
      target);
}

absl::Status Staging::ToDevice(int64_t count, int64_t item_bytes, const Fill& fill, void* target) {
  if (count == 0 || item_bytes == 0) return absl::OkStatus();
  if (item_bytes > kBufferBytes) {
    return absl::InvalidArgumentError(absl::StrCat("an item of ", item_bytes,
                                                   " bytes does not fit the staging buffer of ",
                                                   kBufferBytes, " bytes"));
  }
  const int64_t step = kBufferBytes / item_bytes;
  for (int64_t first = 0; first < count; first += step) {
    const int64_t items = std::min(step, count - first);
    Buffer& buffer = buffers_[next_];
    next_ = 1 - next_;
    QM_CUDA_RETURN(cudaEventSynchronize(buffer.free));
    fill(first, items, buffer.data);
    QM_CUDA_RETURN(cudaMemcpyAsync(static_cast<char*>(target) + first * item_bytes, buffer.data,
                                   static_cast<size_t>(items * item_bytes), cudaMemcpyHostToDevice,
                                   stream_));
    QM_CUDA_RETURN(cudaEventRecord(buffer.free, stream_));
  }
  return absl::OkStatus();
}

absl::Status Staging::ToHost(const void* source, void* target, int64_t bytes) {
  const char* from = static_cast<const char*>(source);
  char* to = static_cast<char*>(target);
  // Chunk i + 1 is on its way while chunk i is copied out of its buffer.
  const int64_t chunks = (bytes + kBufferBytes - 1) / kBufferBytes;
  const auto chunk_bytes = [&](int64_t i) {
    return std::min(kBufferBytes, bytes - i * kBufferBytes);
  };
  for (int64_t i = 0; i <= chunks; ++i) {
    if (i < chunks) {
      Buffer& buffer = buffers_[static_cast<size_t>(i % 2)];
      QM_CUDA_RETURN(cudaEventSynchronize(buffer.free));
      QM_CUDA_RETURN(cudaMemcpyAsync(buffer.data, from + i * kBufferBytes,
                                     static_cast<size_t>(chunk_bytes(i)), cudaMemcpyDeviceToHost,
                                     stream_));
      QM_CUDA_RETURN(cudaEventRecord(buffer.free, stream_));
    }
    if (i > 0) {
      Buffer& buffer = buffers_[static_cast<size_t>((i - 1) % 2)];
      QM_CUDA_RETURN(cudaEventSynchronize(buffer.free));
      HostCopy(to + (i - 1) * kBufferBytes, buffer.data, chunk_bytes(i - 1));
    }
  }
  return absl::OkStatus();
}

}  // namespace quantmill::cuda
