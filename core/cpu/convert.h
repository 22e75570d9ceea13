// Conversions between the model float types, vectorised; round to nearest even like the scalar
// functions of core/tensor/dtype.h.
#ifndef QUANTMILL_CORE_CPU_CONVERT_H_
#define QUANTMILL_CORE_CPU_CONVERT_H_

#include <cstdint>
#include <vector>

#include "core/tensor/dtype.h"
#include "core/tensor/tensor.h"

namespace quantmill::cpu {

// n elements of F32, F16 or BF16 to f32.
void ToF32(const void* source, DType dtype, int64_t n, float* target);
// n elements of f32 to F32, F16 or BF16.
void FromF32(const float* source, int64_t n, DType dtype, void* target);

// A small host tensor (bias, norm weight) as f32.
std::vector<float> F32Values(const Tensor& tensor);

// Address of element `index` of an array of `dtype`.
inline const void* ElementAddress(const void* base, DType dtype, int64_t index) {
  return static_cast<const char*>(base) + index * ElementSize(dtype);
}

}  // namespace quantmill::cpu

#endif  // QUANTMILL_CORE_CPU_CONVERT_H_
