// 8-bit floats on the GPU (kernels: quantmill/sdk/float8.cuh), and codes of affine integers as
// signed bytes: a thread per code. CPU: row8.cc.
#include "quantmill/sdk/cuda.hpp"
#include "quantmill/sdk/float8.cuh"
#include "row8.h"

namespace quantmill::ptq {
namespace {

constexpr int kThreads = 256;

// codes: bytes [rows, row_bytes], the last of a row unused; out: [rows, columns].
__global__ void __launch_bounds__(kThreads)
    codes_to_int8_kernel1(const uint8_t* __restrict__ codes, int64_t row_bytes, int64_t count,
                          int64_t columns, int8_t* __restrict__ out) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  out[index] = static_cast<int8_t>(codes[index / columns * row_bytes + index % columns] ^ 0x80);
}

}  // namespace

qm_status QuantizeFp8Cuda(qm_call* call, const qm::Row8Layout& layout,
                          qm::TensorView<const float> weight, const qm::Row8Tensors& out) {
  return qm::QuantizeFloat8Cuda(call, layout, weight, out);
}

uint64_t Fp8CudaScratchBytes(const qm::Row8Layout& layout) {
  return qm::Float8ScratchBytes(layout);
}

qm_status CodesToInt8Cuda(qm_call* call, const int32_t* codes, int64_t rows, int64_t columns,
                          int8_t* out) {
  const int64_t count = rows * columns;
  const unsigned blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  codes_to_int8_kernel1<<<blocks, kThreads, 0, qm::Stream(call)>>>(
      reinterpret_cast<const uint8_t*>(codes), 4 * qm::AffineWordsPerRow(columns, 8), count,
      columns, out);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

}  // namespace quantmill::ptq
