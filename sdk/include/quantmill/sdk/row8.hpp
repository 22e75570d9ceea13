// Writing qm.fmt.int8-row/1 and qm.fmt.float8/1: a byte per weight, a scale per output channel or
// for all. Functions marked QM_HD give the same bits on host and device when compiled without
// contraction (-ffp-contract=off, --fmad=false).
#ifndef QUANTMILL_SDK_ROW8_HPP_
#define QUANTMILL_SDK_ROW8_HPP_

#include <cstdint>
#include <string>

#include "quantmill/sdk/affine_int.hpp"
#include "quantmill/sdk/plugin.hpp"
#include "quantmill/sdk/tensor.hpp"

namespace qm {

// Ids of the formats (FORMATS.md).
inline constexpr char kInt8RowFormat[] = "qm.fmt.int8-row/1";
// See kInt8RowFormat.
inline constexpr char kFloat8Format[] = "qm.fmt.float8/1";

// ---- 8-bit floats ------------------------------------------------------------------------------
// E4M3 without infinities (largest value 448), E5M2 as an IEEE type (57344). Rounding is to
// nearest, ties to even; larger values saturate; NaN stays a NaN.

// Nearest E4M3.
QM_HD inline uint8_t ToE4M3(float value) {
  const uint32_t bits = FloatBits(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint8_t>(sign | 0x7Fu);
  if (magnitude >= 0x43E00000u) return static_cast<uint8_t>(sign | 0x7Eu);  // >= 448
  if (magnitude < 0x3C800000u) {  // below 2^-6: adding 2^14 aligns the 2^-9 steps with bit 0
    return static_cast<uint8_t>(sign |
                                (FloatBits(FloatFromBits(magnitude) + 16384.0f) - 0x46800000u));
  }
  const uint32_t rounded = magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u);
  return static_cast<uint8_t>(sign | ((rounded - 0x3C000000u) >> 20));
}

// Nearest E5M2.
QM_HD inline uint8_t ToE5M2(float value) {
  const uint32_t bits = FloatBits(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint8_t>(sign | 0x7Fu);
  if (magnitude >= 0x47600000u) return static_cast<uint8_t>(sign | 0x7Bu);  // >= 57344
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 2^7 aligns the 2^-16 steps with bit 0
    return static_cast<uint8_t>(sign |
                                (FloatBits(FloatFromBits(magnitude) + 128.0f) - 0x43000000u));
  }
  const uint32_t rounded = magnitude + 0xFFFFFu + ((magnitude >> 21) & 1u);
  return static_cast<uint8_t>(sign | ((rounded - 0x38000000u) >> 21));
}

// The value of a finite E4M3 code, exact: its bits as a float with another bias of the exponent.
QM_HD inline float FromE4M3(uint8_t code) {
  const uint32_t bits = code;
  return FloatFromBits(((bits & 0x80u) << 24) | ((bits & 0x7Fu) << 20)) * 0x1p120f;
}

// See FromE4M3.
QM_HD inline float FromE5M2(uint8_t code) {
  const uint32_t bits = code;
  return FloatFromBits(((bits & 0x80u) << 24) | ((bits & 0x7Fu) << 21)) * 0x1p112f;
}

// ---- parameters and result tensors -------------------------------------------------------------
// What a linear becomes: format, parameters, and the types of its two tensors.
struct Row8Layout {
  const char* format_id = kInt8RowFormat;  // static storage
  std::string format_json;                 // canonical parameters
  qm_dtype code_dtype = QM_I8;             // I8, F8_E4M3 or F8_E5M2
  qm_dtype scale_dtype = QM_F16;           // F16, BF16 or F32
  int64_t scales = 0;                      // out_features, or 1
  int64_t out_features = 0;                // rows
  int64_t in_features = 0;                 // columns
};

// Of int8-row; `int8_activations`: products quantize their input.
inline Row8Layout Int8RowLayout(const qm_linear_info& info, bool int8_activations) {
  return {kInt8RowFormat,
          int8_activations ? "{\"activations\":\"int8\"}" : "{}",
          QM_I8,
          info.scale_dtype,
          info.out_features,
          info.out_features,
          info.in_features};
}

// Checks features and the type of the scales of a linear that is to be quantized.
inline qm_status CheckRow8Info(qm_call* call, const qm_linear_info& info) {
  if (info.scale_dtype != QM_F16 && info.scale_dtype != QM_BF16 && info.scale_dtype != QM_F32) {
    return Fail(call, QM_INVALID_ARGUMENT, "scale dtype code ", info.scale_dtype,
                " cannot hold scales; use F16, BF16 or F32");
  }
  if (info.out_features <= 0 || info.in_features <= 0) {
    return Fail(call, QM_INVALID_ARGUMENT, "the linear has shape [", info.out_features, ", ",
                info.in_features, "]; both features must be positive");
  }
  return QM_OK;
}

// Says in a plan what EmitRow8 and DescribeRow8 will give.
inline qm_status PlanRow8(qm_call* call, const Row8Layout& layout, qm_quant_plan* out) {
  const double weights =
      static_cast<double>(layout.out_features) * static_cast<double>(layout.in_features);
  const double scale_bits = 8.0 * static_cast<double>(ElementSize(layout.scale_dtype));
  return PlanFormat(call, layout.format_id, layout.format_json,
                    8.0 + scale_bits * static_cast<double>(layout.scales) / weights, out);
}

// Result tensors of one linear.
struct Row8Tensors {
  qm_tensor codes = {};  // [out, in]
  qm_tensor scale = {};  // [scales]
};

// Emits the result tensors of the call's linear.
inline qm_status EmitRow8(qm_call* call, const Row8Layout& layout, Row8Tensors* out) {
  const int64_t codes[2] = {layout.out_features, layout.in_features};
  const int64_t scales[1] = {layout.scales};
  QM_TRY(call->emit(call, 0, "codes", call->device, layout.code_dtype, 2, codes, &out->codes));
  return call->emit(call, 0, "scale", call->device, layout.scale_dtype, 1, scales, &out->scale);
}

// Fills *out from what EmitRow8 returned; names and parameters live in scratch.
inline qm_status DescribeRow8(qm_call* call, const Row8Layout& layout, const Row8Tensors& tensors,
                              qm_packed* out) {
  const qm_device host = {QM_CPU, 0};
  const std::string& json = layout.format_json;
  const char* text = nullptr;
  QM_TRY(ScratchString(call, json, "the result", &text));
  qm_named_tensor* named = nullptr;
  QM_TRY(Scratch(call, host, 2, "the result", &named));
  named[0] = {"codes", tensors.codes};
  named[1] = {"scale", tensors.scale};
  *out = {layout.format_id, text, named, 2, layout.out_features, layout.in_features};
  return QM_OK;
}

}  // namespace qm

#endif  // QUANTMILL_SDK_ROW8_HPP_
