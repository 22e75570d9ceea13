// Each operation goes to the CPU path or to a kernel.
#include <algorithm>
#include <cmath>

#include "oftq.h"
#include "oftq_cpu.h"
#include "oftq_math.h"
#include "quantmill/sdk/plugin.hpp"
#if defined(QM_HAVE_CUDA)
#include "oftq_cuda.h"
#endif

namespace quantmill::oftq {
namespace {

#if defined(QM_HAVE_CUDA)
bool OnGpu(const qm_call* call) { return call->device.kind == QM_CUDA; }
#endif

}  // namespace

qm_status BuildRotation(qm_call* call, const Rotation& rotation, const float* q, float* r) {
#if defined(QM_HAVE_CUDA)
  if (OnGpu(call)) return BuildRotationCuda(call, rotation, q, r);
#endif
  return BuildRotationCpu(call, rotation, q, r);
}

qm_status Rotate(qm_call* call, const Rotation& rotation, const float* r, bool transposed,
                 const Rows& in, bool accumulate, const Rows& out, float* scratch) {
  if (in.rows == 0) return QM_OK;
#if defined(QM_HAVE_CUDA)
  if (OnGpu(call)) return RotateCuda(call, rotation, r, transposed, in, accumulate, out);
#endif
  return RotateCpu(call, rotation, r, transposed, in, accumulate, out, scratch);
}

int64_t RotateScratch(qm_device_kind device, const Rotation& rotation) {
  return device == QM_CPU ? rotation.elements() : 0;
}

qm_status RotationGradient(qm_call* call, const Rotation& rotation, const float* q, const float* r,
                           const Rows& in, const float* d_out, float* d_q, float* scratch) {
  if (in.rows == 0) return QM_OK;
#if defined(QM_HAVE_CUDA)
  if (OnGpu(call)) return RotationGradientCuda(call, rotation, q, r, in, d_out, d_q, scratch);
#else
  (void)scratch;
#endif
  return RotationGradientCpu(call, rotation, q, r, in, d_out, d_q);
}

int64_t GradientScratch(qm_device_kind device, const Rotation& rotation) {
#if defined(QM_HAVE_CUDA)
  if (device == QM_CUDA) return GradientScratchCuda(rotation);
#endif
  (void)device, (void)rotation;
  return 0;
}

qm_status Multiply(qm_call* call, const Product& product, float* scratch) {
  if (product.m == 0 || product.n == 0) return QM_OK;
#if defined(QM_HAVE_CUDA)
  if (OnGpu(call)) return MultiplyCuda(call, product, scratch);
#endif
  return MultiplyCpu(call, product, scratch);
}

int64_t ProductScratch(qm_device_kind device, int64_t numbers) {
#if defined(QM_HAVE_CUDA)
  if (device == QM_CUDA) return ProductScratchCuda();
#endif
  (void)device;
  return numbers;
}

qm_status FillUniform(qm_call* call, uint64_t seed, float bound, float* values, int64_t count) {
#if defined(QM_HAVE_CUDA)
  if (OnGpu(call)) return FillUniformCuda(call, seed, bound, values, count);
#else
  (void)call;
#endif
  for (int64_t i = 0; i < count; ++i) {
    values[i] = bound * UniformAt(seed, static_cast<uint64_t>(i));
  }
  return QM_OK;
}

qm_status FillZero(qm_call* call, float* values, int64_t count) {
#if defined(QM_HAVE_CUDA)
  if (OnGpu(call)) return FillZeroCuda(call, values, count);
#else
  (void)call;
#endif
  std::fill_n(values, count, 0.0f);
  return QM_OK;
}

qm_status FindNotFinite(qm_call* call, const float* values, int64_t count, int64_t* index) {
#if defined(QM_HAVE_CUDA)
  if (OnGpu(call)) return FindNotFiniteCuda(call, values, count, index);
#else
  (void)call;
#endif
  const float* found =
      std::find_if(values, values + count, [](float x) { return !std::isfinite(x); });
  *index = found == values + count ? -1 : found - values;
  return QM_OK;
}

qm_status Copy(qm_call* call, const float* from, float* to, int64_t count) {
#if defined(QM_HAVE_CUDA)
  if (OnGpu(call)) return CopyCuda(call, from, to, count);
#else
  (void)call;
#endif
  std::copy_n(from, count, to);
  return QM_OK;
}

}  // namespace quantmill::oftq
