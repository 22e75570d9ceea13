// The method on the GPU. A thread per group, then a thread per 32-bit word of codes.
#include "my_method.h"
#include "quantmill/sdk/cuda.hpp"

namespace my_method_plugin {
namespace {

constexpr int kThreads = 128;
__global__ void groups_kernel(Job job, int* not_finite) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t groups = job.shape.groups(), width = job.shape.group_width();
  if (index >= job.shape.out_features * groups) return;
  const int64_t row = index / groups, first = index % groups * width;
  for (int64_t i = first; i < first + width; ++i)
    if (!isfinite(job.weight(row, i))) *not_finite = 1;
  QuantizeGroup(job, row, index % groups);
}

__global__ void words_kernel(Job job) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t words = job.words();
  if (index < job.shape.out_features * words) QuantizeWord(job, index / words, index % words);
}

unsigned Blocks(int64_t n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); }

}  // namespace

qm_status QuantizeCuda(qm_call* call, const Job& job) {
  const cudaStream_t stream = qm::Stream(call);  // all work goes here
  const int64_t rows = job.shape.out_features;
  int* flag = nullptr;
  QM_TRY(qm::Scratch(call, call->device, 1, "a flag", &flag));
  QM_CUDA(call, cudaMemsetAsync(flag, 0, sizeof *flag, stream));
  groups_kernel<<<Blocks(rows * job.shape.groups()), kThreads, 0, stream>>>(job, flag);
  words_kernel<<<Blocks(rows * job.words()), kThreads, 0, stream>>>(job);
  QM_CUDA(call, cudaGetLastError());
  int not_finite = 0;
  QM_CUDA(call, cudaMemcpyAsync(&not_finite, flag, sizeof *flag, cudaMemcpyDeviceToHost, stream));
  QM_CUDA(call, cudaStreamSynchronize(stream));
  if (not_finite == 0) return QM_OK;
  return qm::Fail(call, QM_INVALID_ARGUMENT, "a weight is NaN or infinite; repair the checkpoint");
}

}  // namespace my_method_plugin
