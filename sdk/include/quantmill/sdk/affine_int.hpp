// Writing qm.fmt.affine-int/1: the rounding rules of the built-in quantizers, the bit stream, the
// result tensors. Functions marked QM_HD give the same bits on host and device when compiled
// without contraction (-ffp-contract=off, --fmad=false).
#ifndef QUANTMILL_SDK_AFFINE_INT_HPP_
#define QUANTMILL_SDK_AFFINE_INT_HPP_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "quantmill/sdk/plugin.hpp"
#include "quantmill/sdk/tensor.hpp"

namespace qm {

// Id of the format (FORMATS.md).
inline constexpr char kAffineIntFormat[] = "qm.fmt.affine-int/1";

// How a group of weights becomes integers.
struct AffineRule {
  int32_t bits = 4;               // 2, 3, 4 or 8
  bool symmetric = false;         // zero point fixed at 2^(bits-1)
  qm_dtype scale_dtype = QM_F16;  // F16, BF16 or F32

  // The largest code.
  QM_HD float max_code() const { return static_cast<float>((1 << bits) - 1); }
};

// Scale as stored (rounded to scale_dtype), zero point as a whole number in f32.
struct AffineGroup {
  float scale;  // distance between neighbouring values
  float zero;   // the code of 0
};

// Nearest whole number, ties to even, for |x| < 2^22. Adding 1.5 * 2^23 leaves no fraction bits; it
// needs no instruction beyond SSE2, so that plain loops vectorise.
QM_HD inline float RoundHalfEven(float x) {
  constexpr float kMagic = 12582912.0f;
  return (x + kMagic) - kMagic;
}

// `scale` rounded to a storage type; never 0 and never infinite, so that dividing by it is safe.
QM_HD inline float RoundScale(float scale, qm_dtype dtype) {
  if (dtype == QM_F16) {
    const F16 half = ToF16(scale);
    if (half.bits == 0) return 0x1p-24f;
    return half.bits >= 0x7C00u ? 65504.0f : ToFloat(half);
  }
  if (dtype == QM_BF16) {
    const BF16 brain = ToBF16(scale);
    if (brain.bits == 0) return FloatFromBits(1u << 16);
    return brain.bits >= 0x7F80u ? FloatFromBits(0x7F7F0000u) : ToFloat(brain);
  }
  if (scale == 0.0f) return FloatFromBits(1u);
  return scale > 0x1.fffffep127f ? 0x1.fffffep127f : scale;
}

// Scale and zero point for the range [low, high], low <= 0 <= high. Symmetric: the constant zero
// 2^(bits-1). Asymmetric: round(-low / scale) with the stored scale.
QM_HD inline AffineGroup GroupForRange(float low, float high, const AffineRule& rule) {
  const float max_code = rule.max_code();
  const float scale = RoundScale((high - low) / max_code, rule.scale_dtype);
  if (rule.symmetric) return {scale, 0.5f * (max_code + 1.0f)};
  float zero = -low / scale;
  zero = zero < max_code ? RoundHalfEven(zero) : max_code;
  return {scale, zero};
}

// Makes a range out of the extremes of a group: zero lies inside; symmetric ranges are [-m, m],
// also for a group without negative weights (whose upper half the published code clips); a group of
// zeros gets [-1, 1].
QM_HD inline void WidenRange(bool symmetric, float* low, float* high) {
  *low = *low < 0.0f ? *low : 0.0f;
  *high = *high > 0.0f ? *high : 0.0f;
  if (symmetric) {
    *high = *high > -*low ? *high : -*low;
    *low = -*high;
  }
  if (*low == 0.0f && *high == 0.0f) {
    *low = -1.0f;
    *high = 1.0f;
  }
}

// clamp(round(x / scale) + zero, 0, max_code): rounded before the zero is added. Quotients beyond
// +-512 saturate anyway.
QM_HD inline float EncodeAffine(float x, AffineGroup group, float max_code) {
  float q = x / group.scale;
  q = q > -512.0f ? q : -512.0f;
  q = q < 512.0f ? q : 512.0f;
  q = RoundHalfEven(q) + group.zero;
  q = q > 0.0f ? q : 0.0f;
  return q < max_code ? q : max_code;
}

// The weight that a code stands for.
QM_HD inline float DecodeAffine(float code, AffineGroup group) {
  return group.scale * (code - group.zero);
}

// ---- weights that are not finite ---------------------------------------------------------------
// First of n values that is NaN or infinite, or -1.
inline int64_t FirstNotFinite(const float* x, int64_t n) {
  // x - x is 0 for finite x and NaN otherwise; the sum keeps the NaN, and its loop vectorises.
  constexpr int kLanes = 32;
  float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lane[l] += x[i + l] - x[i + l];
  }
  for (int l = 0; i + l < n; ++l) lane[l] += x[i + l] - x[i + l];
  float sum = 0.0f;
  for (const float value : lane) sum += value;
  if (sum == 0.0f) return -1;
  return std::find_if_not(x, x + n, [](float value) { return std::isfinite(value); }) - x;
}

// The error for a weight that is not finite.
inline qm_status NotFinite(qm_call* call, int64_t row, int64_t column) {
  return Fail(call, QM_INVALID_ARGUMENT, "the weight at row ", row, ", column ", column,
              " is NaN or infinite; repair the checkpoint");
}

// ---- bit stream --------------------------------------------------------------------------------
// 32-bit words of a row of codes.
QM_HD inline int64_t AffineWordsPerRow(int64_t in_features, int32_t bits) {
  return (in_features * bits + 31) / 32;
}

// Word `word` of a row's little-endian bit stream. The code of channel i (< 2^bits) is
// codes[position[i]], or codes[i] where position is null.
QM_HD inline uint32_t PackWord(const uint8_t* codes, int64_t in_features, int32_t bits,
                               int64_t word, const int32_t* position = nullptr) {
  const int64_t first_bit = word * 32;
  uint32_t value = 0;
  for (int64_t i = first_bit / bits; i < in_features && i * bits < first_bit + 32; ++i) {
    const int64_t shift = i * bits - first_bit;  // negative for a code begun in the word before
    const uint32_t code = codes[position != nullptr ? position[i] : i];
    value |= shift >= 0 ? code << shift : code >> -shift;
  }
  return value;
}

// Code of channel i of a packed row.
QM_HD inline uint32_t UnpackCode(const int32_t* row, int32_t bits, int64_t i) {
  const int64_t bit = i * bits;
  const int64_t word = bit / 32;
  const int32_t shift = static_cast<int32_t>(bit % 32);
  uint32_t value = static_cast<uint32_t>(row[word]) >> shift;
  if (shift + bits > 32) value |= static_cast<uint32_t>(row[word + 1]) << (32 - shift);
  return value & ((1u << bits) - 1u);
}

// Writes a scale (already rounded to dtype) as element `index`.
QM_HD inline void StoreScale(void* data, qm_dtype dtype, int64_t index, float scale) {
  if (dtype == QM_F16) {
    static_cast<F16*>(data)[index] = ToF16(scale);
  } else if (dtype == QM_BF16) {
    static_cast<BF16*>(data)[index] = ToBF16(scale);
  } else {
    static_cast<float*>(data)[index] = scale;
  }
}

// Element `index` of a scale tensor, widened exactly.
QM_HD inline float LoadScale(const void* data, qm_dtype dtype, int64_t index) {
  if (dtype == QM_F16) return ToFloat(static_cast<const F16*>(data)[index]);
  if (dtype == QM_BF16) return ToFloat(static_cast<const BF16*>(data)[index]);
  return static_cast<const float*>(data)[index];
}

// ---- parameters and result tensors -------------------------------------------------------------
// Parameters of one linear in this format.
struct AffineShape {
  AffineRule rule;           // bits, symmetry, type of the scales
  int64_t out_features = 0;  // rows
  int64_t in_features = 0;   // columns
  int64_t group_size = -1;   // as in the options: -1 = a whole row

  // Input channels of a group.
  QM_HD int64_t group_width() const { return group_size < 0 ? in_features : group_size; }
  // Groups of a row.
  QM_HD int64_t groups() const { return in_features / group_width(); }
};

// Canonical parameters of the format; `zero` is "none", "int" or "float".
inline std::string AffineIntJson(int32_t bits, int64_t group_size, const char* zero) {
  return StrCat("{\"bits\":", bits, ",\"group_size\":", group_size, ",\"zero\":\"", zero, "\"}");
}

// Group sizes worth naming in an error: the powers of two from 16 to 1024 that divide, and -1.
inline std::string ValidGroupSizes(int64_t in_features) {
  std::string text;
  for (int64_t size = 16; size <= 1024; size *= 2) {
    if (in_features % size == 0) text += StrCat(size, ", ");
  }
  return text + "or -1 (one group per output channel)";
}

// The options that ReadAffineShape reads, for a method's table.
inline constexpr qm_option kAffineBitsOption = {
    "bits", "4", "2|3|4|8", "Width of a code in bits.", QM_OPT_I64, 0};
// See kAffineBitsOption.
inline constexpr qm_option kAffineGroupSizeOption = {
    "group_size",
    "128",
    "-1..1048576",
    "Input channels that share a scale; must divide in_features; -1 = one group per output "
    "channel.",
    QM_OPT_I64,
    0};
// See kAffineBitsOption.
inline constexpr qm_option kAffineSymmetricOption = {
    "symmetric", "false", nullptr, "Zero point fixed at 2^(bits-1) instead of one per group.",
    QM_OPT_BOOL, 0};

// Reads the options bits, group_size and symmetric, and checks them against the linear.
inline qm_status ReadAffineShape(qm_call* call, const qm_linear_info& info, AffineShape* out) {
  out->rule.bits = static_cast<int32_t>(OptionI64(call, "bits"));
  out->rule.symmetric = OptionBool(call, "symmetric");
  out->rule.scale_dtype = info.scale_dtype;
  out->out_features = info.out_features;
  out->in_features = info.in_features;
  out->group_size = OptionI64(call, "group_size");
  const int32_t bits = out->rule.bits;
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) {
    return Fail(call, QM_INVALID_ARGUMENT, "bits ", bits, " is not offered; use 2, 3, 4 or 8");
  }
  if (info.scale_dtype != QM_F16 && info.scale_dtype != QM_BF16 && info.scale_dtype != QM_F32) {
    return Fail(call, QM_INVALID_ARGUMENT, "scale dtype code ", info.scale_dtype,
                " cannot hold scales; use F16, BF16 or F32");
  }
  if (info.out_features <= 0 || info.in_features <= 0) {
    return Fail(call, QM_INVALID_ARGUMENT, "the linear has shape [", info.out_features, ", ",
                info.in_features, "]; both features must be positive");
  }
  if (out->group_size == 0 || out->group_size < -1 ||
      (out->group_size > 0 && info.in_features % out->group_size != 0)) {
    return Fail(call, QM_INVALID_ARGUMENT, "group_size ", out->group_size,
                " does not divide in_features ", info.in_features, "; use ",
                ValidGroupSizes(info.in_features));
  }
  return QM_OK;
}

// Says in a plan what EmitAffineInt and DescribeAffineInt will give.
inline qm_status PlanAffineInt(qm_call* call, const AffineShape& shape, bool with_group_index,
                               qm_quant_plan* out) {
  const double rows = static_cast<double>(shape.out_features);
  const double weights = rows * static_cast<double>(shape.in_features);
  const double scale_bits = shape.rule.scale_dtype == QM_F32 ? 32.0 : 16.0;
  const double group_bits = scale_bits + (shape.rule.symmetric ? 0.0 : 8.0);
  const double words = static_cast<double>(AffineWordsPerRow(shape.in_features, shape.rule.bits));
  const double bits = 32.0 * rows * words +
                      group_bits * rows * static_cast<double>(shape.groups()) +
                      (with_group_index ? 32.0 * static_cast<double>(shape.in_features) : 0.0);
  return PlanFormat(
      call, kAffineIntFormat,
      AffineIntJson(shape.rule.bits, shape.group_size, shape.rule.symmetric ? "none" : "int"),
      bits / weights, out);
}

// Result tensors of one linear; zero and group_index have data == nullptr when absent.
struct AffineTensors {
  qm_tensor codes = {};        // I32 [out, words]
  qm_tensor scale = {};        // [out, groups]
  qm_tensor zero = {};         // U8 [out, groups]
  qm_tensor group_index = {};  // I32 [in]
};

// Emits the result tensors of linear `item`; `zero` unless symmetric, `group_index` if asked for.
inline qm_status EmitAffineInt(qm_call* call, uint64_t item, const AffineShape& shape,
                               bool with_group_index, AffineTensors* out) {
  const int64_t codes[2] = {shape.out_features,
                            AffineWordsPerRow(shape.in_features, shape.rule.bits)};
  const int64_t per_group[2] = {shape.out_features, shape.groups()};
  const int64_t index[1] = {shape.in_features};
  *out = {};
  QM_TRY(call->emit(call, item, "codes", call->device, QM_I32, 2, codes, &out->codes));
  QM_TRY(call->emit(call, item, "scale", call->device, shape.rule.scale_dtype, 2, per_group,
                    &out->scale));
  if (!shape.rule.symmetric) {
    QM_TRY(call->emit(call, item, "zero", call->device, QM_U8, 2, per_group, &out->zero));
  }
  if (with_group_index) {
    QM_TRY(
        call->emit(call, item, "group_index", call->device, QM_I32, 1, index, &out->group_index));
  }
  return QM_OK;
}

// Fills *out from what EmitAffineInt returned; names and parameters live in scratch.
inline qm_status DescribeAffineInt(qm_call* call, const AffineShape& shape,
                                   const AffineTensors& tensors, qm_packed* out) {
  const qm_device host = {QM_CPU, 0};
  const std::string json =
      AffineIntJson(shape.rule.bits, shape.group_size, shape.rule.symmetric ? "none" : "int");
  const char* text = nullptr;
  QM_TRY(ScratchString(call, json, "the result", &text));
  qm_named_tensor* named = nullptr;
  QM_TRY(Scratch(call, host, 4, "the result", &named));
  uint64_t count = 0;
  named[count++] = {"codes", tensors.codes};
  named[count++] = {"scale", tensors.scale};
  if (tensors.zero.data != nullptr) named[count++] = {"zero", tensors.zero};
  if (tensors.group_index.data != nullptr) named[count++] = {"group_index", tensors.group_index};
  *out = {kAffineIntFormat, text, named, count, shape.out_features, shape.in_features};
  return QM_OK;
}

}  // namespace qm

#endif  // QUANTMILL_SDK_AFFINE_INT_HPP_
