// The small services on the GPU: drawing, clearing, copying, looking for what is not finite. A
// thread per number. Nothing waits for the device but FindNotFiniteCuda. The CPU path is in
// device.cc.
#include "oftq_cuda.h"
#include "oftq_math.h"
#include "quantmill/sdk/cuda.hpp"
#include "quantmill/sdk/plugin.hpp"

namespace quantmill::oftq {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    lora_uniform_kernel1(uint64_t seed, float bound, float* values, int64_t count) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i < count) values[i] = bound * UniformAt(seed, static_cast<uint64_t>(i));
}

constexpr unsigned long long kNone = ~0ull;

__global__ void __launch_bounds__(kThreads)
    oftq_not_finite_kernel1(const float* values, int64_t count, unsigned long long* first) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i < count && !isfinite(values[i])) atomicMin(first, static_cast<unsigned long long>(i));
}

unsigned GridOf(int64_t count) { return static_cast<unsigned>((count + kThreads - 1) / kThreads); }

}  // namespace

qm_status FillUniformCuda(qm_call* call, uint64_t seed, float bound, float* values, int64_t count) {
  lora_uniform_kernel1<<<GridOf(count), kThreads, 0, qm::Stream(call)>>>(seed, bound, values,
                                                                         count);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

qm_status FillZeroCuda(qm_call* call, float* values, int64_t count) {
  QM_CUDA(call,
          cudaMemsetAsync(values, 0, static_cast<size_t>(count) * sizeof(float), qm::Stream(call)));
  return QM_OK;
}

qm_status FindNotFiniteCuda(qm_call* call, const float* values, int64_t count, int64_t* index) {
  const cudaStream_t stream = qm::Stream(call);
  unsigned long long* first = nullptr;
  QM_TRY(qm::Scratch(call, call->device, 1, "the finiteness check", &first));
  QM_CUDA(call, cudaMemsetAsync(first, 0xFF, sizeof *first, stream));  // kNone
  oftq_not_finite_kernel1<<<GridOf(count), kThreads, 0, stream>>>(values, count, first);
  QM_CUDA(call, cudaGetLastError());
  unsigned long long found = kNone;
  QM_CUDA(call, cudaMemcpyAsync(&found, first, sizeof found, cudaMemcpyDeviceToHost, stream));
  QM_CUDA(call, cudaStreamSynchronize(stream));
  *index = found == kNone ? -1 : static_cast<int64_t>(found);
  return QM_OK;
}

qm_status CopyCuda(qm_call* call, const float* from, float* to, int64_t count) {
  QM_CUDA(call, cudaMemcpyAsync(to, from, static_cast<size_t>(count) * sizeof(float),
                                cudaMemcpyDeviceToDevice, qm::Stream(call)));
  return QM_OK;
}

}  // namespace quantmill::oftq
