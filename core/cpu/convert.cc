#include "core/cpu/convert.h"

#include <cstring>

namespace quantmill::cpu {

void ToF32(const void* source, DType dtype, int64_t n, float* target) {
  if (dtype == DType::kF32) {
    std::memcpy(target, source, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  const uint16_t* bits = static_cast<const uint16_t*>(source);
  if (dtype == DType::kBF16) {
    for (int64_t i = 0; i < n; ++i) target[i] = BF16ToF32(bits[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) target[i] = F16ToF32(bits[i]);
  }
}

void FromF32(const float* source, int64_t n, DType dtype, void* target) {
  if (dtype == DType::kF32) {
    std::memcpy(target, source, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  uint16_t* bits = static_cast<uint16_t*>(target);
  if (dtype == DType::kBF16) {
    for (int64_t i = 0; i < n; ++i) bits[i] = F32ToBF16(source[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) bits[i] = F32ToF16(source[i]);
  }
}

std::vector<float> F32Values(const Tensor& tensor) {
  std::vector<float> values(static_cast<size_t>(tensor.elements()));
  ToF32(tensor.data(), tensor.dtype(), tensor.elements(), values.data());
  return values;
}

}  // namespace quantmill::cpu
