// qm.fmt.additive-codebook/1 (plugin_api/FORMATS.md) inside this plugin: its parameters, a checked
// view of its tensors, and the entry points of the files beside this one.
#ifndef QUANTMILL_PLUGINS_AQLM_CODEBOOK_FORMAT_H_
#define QUANTMILL_PLUGINS_AQLM_CODEBOOK_FORMAT_H_

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>

#include "quantmill/plugin.h"
#include "quantmill/sdk/plugin.hpp"
#include "quantmill/sdk/tensor.hpp"

namespace quantmill::aqlm {

inline constexpr qm_device kHost = {QM_CPU, 0};
inline constexpr const char kFormatName[] = "qm.fmt.additive-codebook/1";

// Plain data: kernels take it by value.
struct Params {
  int32_t codebooks = 2;   // M: vectors added up per group, 1..16
  int32_t group_size = 8;  // d: neighbouring input channels of a row, 1..1024
  int32_t index_bits = 8;  // B: of an index into a codebook of 2^B vectors, 1..16

  QM_HD int32_t length() const { return 1 << index_bits; }
  // Numbers in all codebooks.
  QM_HD int64_t values() const { return static_cast<int64_t>(codebooks) * length() * group_size; }
  qm_dtype code_dtype() const { return index_bits <= 8 ? QM_I8 : QM_I16; }
  bool operator==(const Params& other) const = default;
};

// Parameters from canonical JSON. On failure `why` says what is wrong.
bool ParseParams(const char* json, Params* out, std::string* why);
std::string ParamsJson(const Params& params);
// All bits of a weight [out, in], with codebooks and scales of `value_dtype`, over its weights.
double BitsPerWeight(const Params& params, int64_t out, int64_t in, qm_dtype value_dtype);

// A packed weight as pointers:
//   w[o, j d + a] = scale[o] * sum over m of codebooks[m, index(code[o, j, m]), a],
//   index(code) = code mod 2^B.
struct Weight {
  Params params;
  int64_t out = 0, in = 0;
  const void* codes = nullptr;      // I8 or I16 [out, in / d, M], two's complement
  const void* codebooks = nullptr;  // [M, 2^B, d]
  const void* scales = nullptr;     // [out]
  qm_dtype codebook_dtype = QM_F16, scale_dtype = QM_F16;

  QM_HD int64_t groups() const { return in / params.group_size; }
};

// Structure only (names, dtypes, shapes, parameters).
qm_status ReadWeight(qm_call* call, const qm_packed& packed, Weight* out);
// Codes in range, codebooks and scales finite. Host memory.
qm_status CheckValues(qm_call* call, const Weight& weight);
const qm_tensor* FindTensor(const qm_named_tensor* tensors, uint64_t count, const char* name);
bool IsContiguous(const qm_tensor& tensor);
inline bool IsFloat(qm_dtype dtype) {
  return dtype == QM_F32 || dtype == QM_F16 || dtype == QM_BF16;
}

// One value of a float tensor, widened.
QM_HD inline float LoadValue(const void* data, qm_dtype dtype, int64_t at) {
  if (dtype == QM_F32) return static_cast<const float*>(data)[at];
  if (dtype == QM_F16) return qm::ToFloat(static_cast<const qm::F16*>(data)[at]);
  return qm::ToFloat(static_cast<const qm::BF16*>(data)[at]);
}
QM_HD inline void StoreValue(void* data, qm_dtype dtype, int64_t at, float value) {
  if (dtype == QM_F32) static_cast<float*>(data)[at] = value;
  if (dtype == QM_F16) static_cast<qm::F16*>(data)[at] = qm::ToF16(value);
  if (dtype == QM_BF16) static_cast<qm::BF16*>(data)[at] = qm::ToBF16(value);
}
// What a stored value reads as. Overflow is cut off at the largest finite number.
float RoundToDType(float value, qm_dtype dtype);
// The index behind element `at` of `codes`.
QM_HD inline int32_t LoadIndex(const void* codes, int32_t index_bits, int64_t at) {
  const int32_t code = index_bits <= 8 ? static_cast<const int8_t*>(codes)[at]
                                       : static_cast<const int16_t*>(codes)[at];
  return code & ((1 << index_bits) - 1);
}
// The inverse: index -> stored code (two's complement in `index_bits`).
QM_HD inline int32_t CodeOfIndex(int32_t index, int32_t index_bits) {
  return index < (1 << (index_bits - 1)) ? index : index - (1 << index_bits);
}

// ---- products (kernel_cpu.cc, kernel.cu) --------------------------------------------------------
// Rows up to which the host need not dequantize.
inline constexpr int64_t kCpuMaxRows = 8;
inline constexpr int64_t kCudaMaxRows = 16;      // tensor-core kernel
inline constexpr int64_t kCudaPlainMaxRows = 8;  // any parameters and dtype

qm_status CpuDequantize(qm_call* call, const Weight& weight, qm_tensor* out);
qm_status CpuMatmul(qm_call* call, const Weight& weight, const qm_tensor& x, qm_tensor* y);
qm_status CudaDequantize(qm_call* call, const Weight& weight, qm_tensor* out);
qm_status CudaMatmul(qm_call* call, const Weight& weight, const qm_tensor& x, qm_tensor* y);

// ---- checkpoint (checkpoint.cc) -----------------------------------------------------------------
inline constexpr const char* kTargets[] = {"aqlm"};
qm_status CanStore(qm_call* call, const char* target, const char* format_json, int64_t out,
                   int64_t in);
qm_status ToCheckpoint(qm_call* call, const char* target, const char* layer,
                       const qm_packed& packed, const qm_named_tensor** out, uint64_t* count,
                       const char** config_json);
qm_status FromCheckpoint(qm_call* call, const char* target, const char* layer,
                         const qm_named_tensor* tensors, uint64_t count, const char* config_json,
                         qm_packed* out);

}  // namespace quantmill::aqlm

#endif  // QUANTMILL_PLUGINS_AQLM_CODEBOOK_FORMAT_H_
