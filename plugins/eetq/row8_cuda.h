// What the CUDA files of this plugin offer one another.
#ifndef QUANTMILL_PLUGINS_EETQ_ROW8_CUDA_H_
#define QUANTMILL_PLUGINS_EETQ_ROW8_CUDA_H_

#include "row8_device.cuh"

namespace eetq {

// ---- row8_tiles.cuh, an instance per code in row8_tiles_*.cu ------------------------------------
// y = x W^T on tensor cores. `in` is a multiple of kTileAlignment, codes and x are aligned to 16
// bytes. x_dtype: F16 or BF16, or I8 for int8 codes. Any number of rows.
inline constexpr int64_t kTileAlignment = 16;
template <Code kCode>
qm_status MultiplyTiles(qm_call* call, const DeviceProduct& product, qm_dtype x_dtype);
extern template qm_status MultiplyTiles<Code::kInt8>(qm_call*, const DeviceProduct&, qm_dtype);
extern template qm_status MultiplyTiles<Code::kE4M3>(qm_call*, const DeviceProduct&, qm_dtype);
extern template qm_status MultiplyTiles<Code::kE5M2>(qm_call*, const DeviceProduct&, qm_dtype);

// ---- row8_activations.cu ------------------------------------------------------------------------
// x [rows, in] (F32, F16 or BF16) rounded per row: to I8 for int8 codes, else to E4M3 values held
// in F16. scale: [rows]. A row with a value that is not finite gets zeros and the scale NaN.
qm_status QuantizeActivations(qm_call* call, Code code, const qm_tensor& x, void* rounded,
                              float* scale);

// Rows at most of weights that do not quantize activations, f16 or bf16, on tensor cores; and of
// everything else. Above, the host dequantizes.
inline constexpr int64_t kCudaMaxRows = 64;
inline constexpr int64_t kCudaPlainMaxRows = 8;

}  // namespace eetq

#endif  // QUANTMILL_PLUGINS_EETQ_ROW8_CUDA_H_
