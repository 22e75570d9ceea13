#include "core/formats/float8.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_format.h"
#include "core/base/status.h"
#include "core/formats/row_parts.h"

namespace quantmill {
namespace {

// Sign, exponent, mantissa from the top. E4M3: no infinities, NaN only where all bits but the sign
// are 1. E5M2: as an IEEE type.
struct Layout {
  int mantissa_bits, bias;
  int largest;  // code of the largest finite value
};
Layout LayoutOf(DType type) {
  return type == DType::kF8E4M3 ? Layout{3, 7, 0x7E} : Layout{2, 15, 0x7B};
}

absl::StatusOr<RowParts> FindParts(const PackedWeight& weight, Float8Params* params) {
  if (weight.format_id != kFloat8Id) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrFormat("weight has format '%s'", weight.format_id),
                  absl::StrFormat("expected '%s'", kFloat8Id)));
  }
  QM_ASSIGN_OR_RETURN(*params, ParseFloat8Json(weight.format_json));
  QM_ASSIGN_OR_RETURN(
      const RowParts parts,
      FindRowParts(weight, params->dtype, params->per_tensor ? 1 : weight.out_features));
  for (int64_t i = 0; i < parts.codes->elements(); ++i) {
    const int code = static_cast<const uint8_t*>(parts.codes->data())[i];
    if ((code & 0x7F) <= LayoutOf(params->dtype).largest) continue;
    return absl::InvalidArgumentError(
        absl::StrFormat("the code of row %d, column %d is 0x%02X, which is no finite number",
                        i / weight.in_features, i % weight.in_features, code));
  }
  return parts;
}

}  // namespace

float Float8ToF32(DType type, uint8_t bits) {
  const Layout layout = LayoutOf(type);
  const int magnitude = bits & 0x7F;
  const int steps = 1 << layout.mantissa_bits;
  const int exponent = magnitude / steps, mantissa = magnitude % steps;
  float value = 0;
  if (magnitude > layout.largest) {
    const bool infinite = type == DType::kF8E5M2 && mantissa == 0;
    value =
        infinite ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), 1 - layout.bias - layout.mantissa_bits);
  } else {
    value = std::ldexp(static_cast<float>(steps + mantissa),
                       exponent - layout.bias - layout.mantissa_bits);
  }
  return (bits & 0x80) != 0 ? -value : value;
}

uint8_t F32ToFloat8(DType type, float value) {
  const Layout layout = LayoutOf(type);
  const int sign = std::signbit(value) ? 0x80 : 0;
  if (std::isnan(value)) return static_cast<uint8_t>(sign | 0x7F);
  const float magnitude = std::fabs(value);
  // The neighbours are two codes; an even code wins a tie. Codes grow with their values.
  int below = 0;
  while (below < layout.largest &&
         Float8ToF32(type, static_cast<uint8_t>(below + 1)) <= magnitude) {
    ++below;
  }
  if (below == layout.largest) return static_cast<uint8_t>(sign | below);
  const double low = Float8ToF32(type, static_cast<uint8_t>(below));
  const double high = Float8ToF32(type, static_cast<uint8_t>(below + 1));
  const double to_low = magnitude - low, to_high = high - magnitude;
  const bool up = to_high < to_low || (to_high == to_low && below % 2 == 1);
  return static_cast<uint8_t>(sign | (below + (up ? 1 : 0)));
}

std::string Float8Json(const Float8Params& params) {
  return absl::StrFormat(
      R"({%s"dtype":"%s","scale":"%s"})", params.fp8_activations ? R"("activations":"fp8",)" : "",
      params.dtype == DType::kF8E4M3 ? "e4m3" : "e5m2", params.per_tensor ? "tensor" : "channel");
}

absl::StatusOr<Float8Params> ParseFloat8Json(std::string_view json) {
  for (const DType dtype : {DType::kF8E4M3, DType::kF8E5M2}) {
    for (const bool per_tensor : {false, true}) {
      for (const bool activations : {false, true}) {
        if (activations && dtype == DType::kF8E5M2) continue;
        const Float8Params params = {dtype, per_tensor, activations};
        if (Float8Json(params) == json) return params;
      }
    }
  }
  return absl::InvalidArgumentError(
      ErrorText(absl::StrFormat("parameters '%s' are not those of float8", json),
                "keys must be sorted, without spaces",
                R"(expected e.g. {"dtype":"e4m3","scale":"channel"})"));
}

absl::Status CheckFloat8(const PackedWeight& weight) {
  Float8Params params;
  return FindParts(weight, &params).status();
}

absl::Status DequantizeFloat8Reference(const PackedWeight& weight, Tensor* out) {
  Float8Params params;
  QM_ASSIGN_OR_RETURN(const RowParts parts, FindParts(weight, &params));
  QM_RETURN_IF_ERROR(CheckDenseTarget(weight, *out));
  const uint8_t* codes = static_cast<const uint8_t*>(parts.codes->data());
  for (int64_t o = 0; o < weight.out_features; ++o) {
    const float scale = LoadFloat(*parts.scale, params.per_tensor ? 0 : o);
    for (int64_t i = 0; i < weight.in_features; ++i) {
      const int64_t at = o * weight.in_features + i;
      StoreFloat(*out, at, scale * Float8ToF32(params.dtype, codes[at]));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<PackedWeight> MakeFloat8(const Float8Params& params, const Tensor& codes,
                                        const Tensor& scale) {
  if (codes.rank() != 2) return absl::InvalidArgumentError("codes must be a matrix");
  PackedWeight weight = {std::string(kFloat8Id),
                         Float8Json(params),
                         {{"codes", codes}, {"scale", scale}},
                         codes.dim(0),
                         codes.dim(1)};
  QM_RETURN_IF_ERROR(CheckFloat8(weight));
  return weight;
}

}  // namespace quantmill
