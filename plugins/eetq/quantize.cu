// Rounding on the GPU; the bits of quantize_ref.cc (compiled with --fmad=false).
//
//   int8_rows_kernel1   a block per row: its largest magnitude, scale, codes
//
// A row is read twice; the second time it comes from a cache. Assumed: rows of the weight are
// contiguous.
#include "quantize.h"
#include "quantmill/sdk/cuda.hpp"
#include "quantmill/sdk/float8.cuh"

namespace eetq {
namespace {

// weight: [out, in] with row stride; codes: [out, in]; scale: [out]; bad: least index of a weight
// that is not finite.
__global__ void __launch_bounds__(qm::kFloat8Threads)
    int8_rows_kernel1(const float* __restrict__ weight, int64_t row_stride, int64_t in_features,
                      qm_dtype scale_dtype, int8_t* __restrict__ codes, void* __restrict__ scale,
                      unsigned long long* bad) {
  const int64_t row = blockIdx.x;
  const float* w = weight + row * row_stride;
  __shared__ float shared_divisor;
  const uint32_t magnitude = qm::RowMagnitudeBits(w, in_features, row * in_features, bad);
  if (threadIdx.x == 0) {
    const RowScale s = ScaleOfRow(qm::FloatFromBits(magnitude), scale_dtype);
    qm::StoreScale(scale, scale_dtype, row, s.stored);
    shared_divisor = s.divisor;
  }
  __syncthreads();
  const float divisor = shared_divisor;
  for (int64_t i = threadIdx.x; i < in_features; i += qm::kFloat8Threads) {
    codes[row * in_features + i] = EncodeInt8(w[i], divisor);
  }
}

}  // namespace

uint64_t CudaScratchBytes(const qm::Row8Layout& layout) { return qm::Float8ScratchBytes(layout); }

qm_status QuantizeInt8Cuda(qm_call* call, const qm::Row8Layout& layout,
                           qm::TensorView<const float> weight, const qm::Row8Tensors& out) {
  const cudaStream_t stream = qm::Stream(call);
  unsigned long long* bad = nullptr;
  QM_TRY(qm::Progress(call, 0.0));
  QM_TRY(qm::Scratch(call, call->device, 1, "the finiteness check", &bad));
  QM_CUDA(call, cudaMemsetAsync(bad, 0xFF, sizeof *bad, stream));
  int8_rows_kernel1<<<static_cast<unsigned>(layout.out_features), qm::kFloat8Threads, 0, stream>>>(
      weight.data(), weight.stride(0), layout.in_features, layout.scale_dtype,
      static_cast<int8_t*>(out.codes.data), out.scale.data, bad);
  QM_CUDA(call, cudaGetLastError());
  return qm::FinishFiniteCheck(call, bad, layout.in_features);
}

qm_status QuantizeFp8Cuda(qm_call* call, const qm::Row8Layout& layout,
                          qm::TensorView<const float> weight, const qm::Row8Tensors& out) {
  return qm::QuantizeFloat8Cuda(call, layout, weight, out);
}

}  // namespace eetq
