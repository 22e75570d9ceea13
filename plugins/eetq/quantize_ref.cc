// INT8 rounding on the CPU: the reference of quantize.cu.
#include "quantize.h"

namespace eetq {

qm_status QuantizeInt8Cpu(qm_call* call, const qm::Row8Layout& layout,
                          qm::TensorView<const float> weight, const qm::Row8Tensors& out) {
  std::vector<float> largest;
  QM_TRY(qm::RowMagnitudes(call, weight, &largest));
  const int64_t rows = layout.out_features, columns = layout.in_features;
  return qm::ParallelFor(call, rows, 8, [&](int64_t begin, int64_t end, int32_t) {
    for (int64_t row = begin; row < end; ++row) {
      const RowScale scale = ScaleOfRow(largest[static_cast<size_t>(row)], layout.scale_dtype);
      qm::StoreScale(out.scale.data, layout.scale_dtype, row, scale.stored);
      const float* w = weight.row(row);
      int8_t* codes = static_cast<int8_t*>(out.codes.data) + row * columns;
      for (int64_t i = 0; i < columns; ++i) codes[i] = EncodeInt8(w[i], scale.divisor);
    }
    return qm::Progress(call, 0.5 + 0.5 * static_cast<double>(end) / static_cast<double>(rows));
  });
}

}  // namespace eetq
