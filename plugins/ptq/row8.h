// What ptq does beside integers in groups: 8-bit floats, and INT8 rows whose products quantize
// their input.
#ifndef QUANTMILL_PLUGINS_PTQ_ROW8_H_
#define QUANTMILL_PLUGINS_PTQ_ROW8_H_

#include "ptq.h"
#include "quantmill/sdk/float8.hpp"
#include "quantmill/sdk/row8.hpp"

namespace quantmill::ptq {

// 8-bit floats (quantmill/sdk/float8.hpp) by device.
qm_status QuantizeFp8(qm_call* call, const qm::Row8Layout& layout,
                      qm::TensorView<const float> weight, const qm::Row8Tensors& out);

// int8-row from the range search of affine integers: 8 bits, a group per row, symmetric. The codes
// are those of affine-int less 128.
qm_status QuantizeInt8(qm_call* call, const Options& options, const qm::Row8Layout& layout,
                       qm::TensorView<const float> weight, const qm::Row8Tensors& out);

qm_status QuantizeFp8Cuda(qm_call* call, const qm::Row8Layout& layout,
                          qm::TensorView<const float> weight, const qm::Row8Tensors& out);
uint64_t Fp8CudaScratchBytes(const qm::Row8Layout& layout);

// codes: [rows, words] of 8-bit codes as QuantizeCpu and QuantizeCuda write them, on the device of
// `call`; out: I8 [rows, columns].
qm_status CodesToInt8Cuda(qm_call* call, const int32_t* codes, int64_t rows, int64_t columns,
                          int8_t* out);

}  // namespace quantmill::ptq

#endif  // QUANTMILL_PLUGINS_PTQ_ROW8_H_
