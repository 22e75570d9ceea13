// The operations of awq.h on whatever device the call works on.
#include <cstring>

#include "awq.h"
#if defined(QM_HAVE_CUDA)
#include "quantmill/sdk/cuda.hpp"
#endif

namespace quantmill::awq {
namespace {

qm_status NoKernels(qm_call* call) {
  return qm::Fail(call, QM_FAILED_PRECONDITION,
                  "this build of awq has no CUDA kernels; use device cpu");
}

}  // namespace

qm_status FakeQuant(qm_call* call, const Rows& w, const float* scale, const Rounding& rounding,
                    bool difference, float* out) {
  if (call->device.kind == QM_CPU) return FakeQuantCpu(call, w, scale, rounding, difference, out);
#if defined(QM_HAVE_CUDA)
  if (call->device.kind == QM_CUDA) return FakeQuantCuda(call, w, scale, rounding, difference, out);
#endif
  return NoKernels(call);
}

qm_status ClipDeltas(qm_call* call, const Rows& w, const float* scale, const Rounding& rounding,
                     const ClipGrid& grid, float* delta, float* maximum) {
  if (call->device.kind == QM_CPU) {
    return ClipDeltasCpu(call, w, scale, rounding, grid, delta, maximum);
  }
#if defined(QM_HAVE_CUDA)
  if (call->device.kind == QM_CUDA) {
    return ClipDeltasCuda(call, w, scale, rounding, grid, delta, maximum);
  }
#endif
  return NoKernels(call);
}

qm_status RowDots(qm_call* call, const float* a, const float* b, int64_t rows, int64_t columns,
                  float* sums) {
  if (call->device.kind == QM_CPU) return RowDotsCpu(call, a, b, rows, columns, sums);
#if defined(QM_HAVE_CUDA)
  if (call->device.kind == QM_CUDA) return RowDotsCuda(call, a, b, rows, columns, sums);
#endif
  return NoKernels(call);
}

qm_status AddRelative(qm_call* call, const Rows& w, int64_t width, std::vector<double>* sums) {
  if (call->device.kind == QM_CPU) return AddRelativeCpu(call, w, width, sums);
#if defined(QM_HAVE_CUDA)
  if (call->device.kind == QM_CUDA) return AddRelativeCuda(call, w, width, sums);
#endif
  return NoKernels(call);
}

qm_status ToHost(qm_call* call, const float* from, int64_t count, float* to) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(float);
#if defined(QM_HAVE_CUDA)
  if (call->device.kind == QM_CUDA) {
    const cudaStream_t stream = qm::Stream(call);
    QM_CUDA(call, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream));
    QM_CUDA(call, cudaStreamSynchronize(stream));
    return QM_OK;
  }
#endif
  if (call->device.kind != QM_CPU) return NoKernels(call);
  std::memcpy(to, from, bytes);
  return QM_OK;
}

qm_status ToDevice(qm_call* call, const float* from, int64_t count, float* to) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(float);
#if defined(QM_HAVE_CUDA)
  if (call->device.kind == QM_CUDA) {
    const cudaStream_t stream = qm::Stream(call);
    QM_CUDA(call, cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream));
    QM_CUDA(call, cudaStreamSynchronize(stream));
    return QM_OK;
  }
#endif
  if (call->device.kind != QM_CPU) return NoKernels(call);
  std::memcpy(to, from, bytes);
  return QM_OK;
}

}  // namespace quantmill::awq
