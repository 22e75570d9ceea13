// Storage types of tensors; numeric values equal qm_dtype, names are those of safetensors.
#ifndef QUANTMILL_CORE_TENSOR_DTYPE_H_
#define QUANTMILL_CORE_TENSOR_DTYPE_H_

#include <cstdint>
#include <cstring>
#include <optional>
#include <string_view>

#include "quantmill/plugin.h"

namespace quantmill {

enum class DType : int32_t {
  kF32 = QM_F32,
  kF16 = QM_F16,
  kBF16 = QM_BF16,
  kF64 = QM_F64,
  kF8E4M3 = QM_F8_E4M3,
  kF8E5M2 = QM_F8_E5M2,
  kI8 = QM_I8,
  kU8 = QM_U8,
  kI16 = QM_I16,
  kI32 = QM_I32,
  kI64 = QM_I64,
};

// Bytes of one element.
int64_t ElementSize(DType dtype);
// "F32", "BF16", "F8_E4M3", ...: the safetensors spelling.
std::string_view DTypeName(DType dtype);
// The inverse; nullopt for a name that is not one of ours (BOOL, U16, ...).
std::optional<DType> DTypeFromName(std::string_view name);
// True for the types a model can be stored and computed in: F32, F16, BF16.
bool IsModelFloat(DType dtype);

// ---- scalar conversions, round to nearest even; the reference for every vector path -------------
float BF16ToF32(uint16_t bits);
uint16_t F32ToBF16(float value);  // NaN stays a (quiet) NaN
float F16ToF32(uint16_t bits);
uint16_t F32ToF16(float value);  // overflow gives infinity

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TENSOR_DTYPE_H_
