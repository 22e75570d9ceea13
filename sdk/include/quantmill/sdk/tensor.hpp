// Typed views of qm_tensor, 16-bit float types and their conversions (host and device).
#ifndef QUANTMILL_SDK_TENSOR_HPP_
#define QUANTMILL_SDK_TENSOR_HPP_

#include <cassert>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "quantmill/plugin.h"
#include "quantmill/sdk/status.hpp"

#if defined(__CUDACC__)
#define QM_HD __host__ __device__
#else
#define QM_HD
#endif

namespace qm {

// Storage of a 16-bit float; arithmetic is done in f32.
struct F16 {
  uint16_t bits;  // as stored
};
// See F16.
struct BF16 {
  uint16_t bits;  // as stored
};

// The bits of a float.
QM_HD inline uint32_t FloatBits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
// The float with these bits.
QM_HD inline float FloatFromBits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Exact.
QM_HD inline float ToFloat(BF16 x) { return FloatFromBits(static_cast<uint32_t>(x.bits) << 16); }
// Round to nearest, ties to even; NaN stays a NaN.
QM_HD inline BF16 ToBF16(float value) {
  const uint32_t bits = FloatBits(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

// Exact. A NaN's payload may differ between host and device.
QM_HD inline float ToFloat(F16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1Fu;
  const uint32_t mantissa = x.bits & 0x3FFu;
  if (exponent == 31) return FloatFromBits(sign | 0x7F800000u | (mantissa << 13));
  if (exponent != 0) return FloatFromBits(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal, exact
  return sign != 0 ? -magnitude : magnitude;
#endif
}
// Round to nearest, ties to even; overflow gives infinity, NaN stays a NaN (payload as above).
QM_HD inline F16 ToF16(float value) {
#if defined(__CUDA_ARCH__)
  F16 half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(value));
  return half;
#else
  const uint32_t bits = FloatBits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};
  if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // >= 65520
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the 2^-24 steps with bit 0
    const uint32_t shifted = FloatBits(FloatFromBits(magnitude) + 0.5f);
    return {static_cast<uint16_t>(sign | (shifted - 0x3F000000u))};
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

// DTypeOf<T>::value is the dtype code of a C++ type.
template <class T>
struct DTypeOf;
// A dtype code as a type.
template <qm_dtype kDType>
struct DTypeConstant {
  // The code.
  static constexpr qm_dtype value = kDType;
};
// dtype of float
template <>
struct DTypeOf<float> : DTypeConstant<QM_F32> {};
// dtype of double
template <>
struct DTypeOf<double> : DTypeConstant<QM_F64> {};
// dtype of F16
template <>
struct DTypeOf<F16> : DTypeConstant<QM_F16> {};
// dtype of BF16
template <>
struct DTypeOf<BF16> : DTypeConstant<QM_BF16> {};
// dtype of int8_t
template <>
struct DTypeOf<int8_t> : DTypeConstant<QM_I8> {};
// dtype of uint8_t
template <>
struct DTypeOf<uint8_t> : DTypeConstant<QM_U8> {};
// dtype of int16_t
template <>
struct DTypeOf<int16_t> : DTypeConstant<QM_I16> {};
// dtype of int32_t
template <>
struct DTypeOf<int32_t> : DTypeConstant<QM_I32> {};
// dtype of int64_t
template <>
struct DTypeOf<int64_t> : DTypeConstant<QM_I64> {};

// Bytes of one element; 0 for a type that is not one of ours.
inline int64_t ElementSize(qm_dtype dtype) {
  switch (dtype) {
    case QM_F64:
    case QM_I64:
      return 8;
    case QM_F32:
    case QM_I32:
      return 4;
    case QM_F16:
    case QM_BF16:
    case QM_I16:
      return 2;
    case QM_F8_E4M3:
    case QM_F8_E5M2:
    case QM_I8:
    case QM_U8:
      return 1;
    default:
      return 0;
  }
}

// A typed view of up to four dimensions; owns nothing. Indices are asserted in debug builds.
template <class T>
class TensorView {
 public:
  TensorView() = default;
  // The caller has checked dtype and device (ViewMatrix does).
  QM_HD explicit TensorView(const qm_tensor& t) : data_(static_cast<T*>(t.data)), rank_(t.rank) {
    for (int d = 0; d < QM_MAX_RANK; ++d) {
      shape_[d] = t.shape[d];
      stride_[d] = t.stride[d];
    }
  }

  // First element.
  QM_HD T* data() const { return data_; }
  // Dimensions.
  QM_HD int rank() const { return rank_; }
  // Extent of an axis.
  QM_HD int64_t shape(int axis) const { return shape_[axis]; }
  // Elements between neighbours along an axis.
  QM_HD int64_t stride(int axis) const { return stride_[axis]; }

  // An element of a vector.
  QM_HD T& operator()(int64_t i) const { return data_[Offset(0, i)]; }
  // An element of a matrix.
  QM_HD T& operator()(int64_t i, int64_t j) const { return data_[Offset(0, i) + Offset(1, j)]; }
  // An element of a rank-3 tensor.
  QM_HD T& operator()(int64_t i, int64_t j, int64_t k) const {
    return data_[Offset(0, i) + Offset(1, j) + Offset(2, k)];
  }
  // First element of row i of a matrix.
  QM_HD T* row(int64_t i) const { return data_ + Offset(0, i); }

 private:
  QM_HD int64_t Offset(int axis, int64_t i) const {
    assert(axis < rank_ && i >= 0 && i < shape_[axis]);
    return i * stride_[axis];
  }

  T* data_ = nullptr;
  int rank_ = 0;
  int64_t shape_[QM_MAX_RANK] = {};
  int64_t stride_[QM_MAX_RANK] = {};
};

// Checks that `tensor` is a matrix [rows, cols] of type T on `device` whose rows are contiguous
// (the distance between rows is free); `what` names it in the error.
template <class T>
qm_status ViewMatrix(qm_call* call, const qm_tensor& tensor, const char* what, qm_device device,
                     int64_t rows, int64_t cols, TensorView<const T>* out) {
  if (tensor.rank != 2 || tensor.shape[0] != rows || tensor.shape[1] != cols) {
    return Fail(call, QM_INVALID_ARGUMENT, what, " must have shape [", rows, ", ", cols, "]");
  }
  if (tensor.dtype != DTypeOf<T>::value) {
    return Fail(call, QM_INVALID_ARGUMENT, what, " has dtype code ", tensor.dtype, "; expected ",
                DTypeOf<T>::value);
  }
  if (tensor.device.kind != device.kind || tensor.device.index != device.index) {
    return Fail(call, QM_INVALID_ARGUMENT, what, " is not on the device of the call");
  }
  if (cols > 1 && tensor.stride[1] != 1) {
    return Fail(call, QM_INVALID_ARGUMENT, what, " must have contiguous rows; pass a copy");
  }
  *out = TensorView<const T>(tensor);
  return QM_OK;
}

// A contiguous row-major [rows, cols] tensor over memory of the caller.
template <class T>
qm_tensor MakeMatrix(T* data, int64_t rows, int64_t cols, int64_t row_stride, qm_device device) {
  qm_tensor t = {};
  t.data = const_cast<void*>(static_cast<const void*>(data));
  t.dtype = DTypeOf<std::remove_const_t<T>>::value;
  t.rank = 2;
  t.device = device;
  t.shape[0] = rows;
  t.shape[1] = cols;
  t.shape[2] = t.shape[3] = 1;
  t.stride[0] = row_stride;
  t.stride[1] = 1;
  return t;
}

}  // namespace qm

#endif  // QUANTMILL_SDK_TENSOR_HPP_
