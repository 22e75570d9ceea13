// Small device functions shared by the kernels.
#ifndef QUANTMILL_PLUGINS_EETQ_ROW8_DEVICE_CUH_
#define QUANTMILL_PLUGINS_EETQ_ROW8_DEVICE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "row8.h"

namespace eetq {

// A product or a dense copy as kernels see it: pointers on the device.
struct DeviceProduct {
  const uint8_t* codes;    // [out, in]
  const void* scale;       // [out], or [1] if per_tensor
  qm_dtype scale_dtype;    // F16, BF16 or F32
  bool per_tensor;         //
  int64_t out, in;         //
  const void* x;           // [rows, in]
  const float* row_scale;  // [rows] of quantized activations; null: 1
  int64_t rows;            //
  void* y;                 // [rows, out]
  qm_dtype y_dtype;        // F32, F16 or BF16
};

template <Code kCode>
__device__ inline float ValueOf(uint8_t code) {
  if constexpr (kCode == Code::kInt8) return static_cast<float>(static_cast<int8_t>(code));
  if constexpr (kCode == Code::kE4M3) return qm::FromE4M3(code);
  return qm::FromE5M2(code);
}

__device__ inline float LoadNumber(const void* data, qm_dtype dtype, int64_t index) {
  if (dtype == QM_F16) return __half2float(static_cast<const __half*>(data)[index]);
  if (dtype == QM_BF16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
  return static_cast<const float*>(data)[index];
}

__device__ inline void StoreNumber(void* data, qm_dtype dtype, int64_t index, float value) {
  if (dtype == QM_F16) {
    static_cast<__half*>(data)[index] = __float2half_rn(value);
  } else if (dtype == QM_BF16) {
    static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16_rn(value);
  } else {
    static_cast<float*>(data)[index] = value;
  }
}

__device__ inline float ScaleOf(const DeviceProduct& p, int64_t row) {
  return LoadNumber(p.scale, p.scale_dtype, p.per_tensor ? 0 : row);
}

// y[r, row] = sum * (scale of the row of x) * (scale of the row of W).
__device__ inline void StoreResult(const DeviceProduct& p, int64_t r, int64_t row, float sum) {
  if (p.row_scale != nullptr) sum *= p.row_scale[r];
  StoreNumber(p.y, p.y_dtype, r * p.out + row, sum * ScaleOf(p, row));
}

}  // namespace eetq

#endif  // QUANTMILL_PLUGINS_EETQ_ROW8_DEVICE_CUH_
