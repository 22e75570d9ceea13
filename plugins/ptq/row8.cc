// See row8.h.
#include "row8.h"

namespace quantmill::ptq {
namespace {

// Four codes to a word, rows padded to whole words.
void CodesToInt8Cpu(const int32_t* codes, int64_t rows, int64_t columns, int8_t* out) {
  const int64_t words = qm::AffineWordsPerRow(columns, 8);
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(codes);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < columns; ++i) {
      out[row * columns + i] = static_cast<int8_t>(bytes[row * words * 4 + i] ^ 0x80);
    }
  }
}

}  // namespace

qm_status QuantizeFp8(qm_call* call, const qm::Row8Layout& layout,
                      qm::TensorView<const float> weight, const qm::Row8Tensors& out) {
  if (call->device.kind == QM_CPU) return qm::QuantizeFloat8Cpu(call, layout, weight, out);
#if defined(QM_HAVE_CUDA)
  if (call->device.kind == QM_CUDA) return QuantizeFp8Cuda(call, layout, weight, out);
#endif
  return qm::Fail(call, QM_FAILED_PRECONDITION,
                  "this build of ptq has no CUDA kernels; use device cpu");
}

qm_status QuantizeInt8(qm_call* call, const Options& options, const qm::Row8Layout& layout,
                       qm::TensorView<const float> weight, const qm::Row8Tensors& out) {
  const int64_t rows = layout.out_features, columns = layout.in_features;
  const int64_t words = qm::AffineWordsPerRow(columns, 8);
  int32_t* codes = nullptr;
  QM_TRY(qm::Scratch(call, call->device, rows * words, "codes of the weight", &codes));
  qm::AffineTensors affine;
  affine.codes.data = codes;
  affine.scale = out.scale;
  int8_t* target = static_cast<int8_t*>(out.codes.data);
  if (call->device.kind == QM_CPU) {
    QM_TRY(QuantizeCpu(call, options, weight, affine));
    CodesToInt8Cpu(codes, rows, columns, target);
    return QM_OK;
  }
#if defined(QM_HAVE_CUDA)
  if (call->device.kind == QM_CUDA) {
    QM_TRY(QuantizeCuda(call, options, weight, affine));
    return CodesToInt8Cuda(call, codes, rows, columns, target);
  }
#endif
  return qm::Fail(call, QM_FAILED_PRECONDITION,
                  "this build of ptq has no CUDA kernels; use device cpu");
}

}  // namespace quantmill::ptq
