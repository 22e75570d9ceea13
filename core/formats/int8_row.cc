#include "core/formats/int8_row.h"

#include "absl/strings/str_format.h"
#include "core/base/status.h"
#include "core/formats/row_parts.h"

namespace quantmill {
namespace {

absl::StatusOr<RowParts> FindInt8Parts(const PackedWeight& weight) {
  if (weight.format_id != kInt8RowId) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrFormat("weight has format '%s'", weight.format_id),
                  absl::StrFormat("expected '%s'", kInt8RowId)));
  }
  QM_RETURN_IF_ERROR(ParseInt8RowJson(weight.format_json).status());
  return FindRowParts(weight, DType::kI8, weight.out_features);
}

}  // namespace

std::string Int8RowJson(const Int8RowParams& params) {
  return params.int8_activations ? R"({"activations":"int8"})" : "{}";
}

absl::StatusOr<Int8RowParams> ParseInt8RowJson(std::string_view json) {
  for (const bool activations : {false, true}) {
    const Int8RowParams params = {activations};
    if (Int8RowJson(params) == json) return params;
  }
  return absl::InvalidArgumentError(
      ErrorText(absl::StrFormat("parameters '%s' are not those of int8-row", json), "",
                R"(expected {} or {"activations":"int8"})"));
}

absl::Status CheckInt8Row(const PackedWeight& weight) { return FindInt8Parts(weight).status(); }

absl::Status DequantizeInt8RowReference(const PackedWeight& weight, Tensor* out) {
  QM_ASSIGN_OR_RETURN(const RowParts parts, FindInt8Parts(weight));
  QM_RETURN_IF_ERROR(CheckDenseTarget(weight, *out));
  for (int64_t o = 0; o < weight.out_features; ++o) {
    const float scale = LoadFloat(*parts.scale, o);
    for (int64_t i = 0; i < weight.in_features; ++i) {
      const int64_t at = o * weight.in_features + i;
      StoreFloat(*out, at, scale * static_cast<float>(parts.codes->as<int8_t>()[at]));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<PackedWeight> MakeInt8Row(const Int8RowParams& params, const Tensor& codes,
                                         const Tensor& scale) {
  if (codes.rank() != 2) return absl::InvalidArgumentError("codes must be a matrix");
  PackedWeight weight = {std::string(kInt8RowId),
                         Int8RowJson(params),
                         {{"codes", codes}, {"scale", scale}},
                         codes.dim(0),
                         codes.dim(1)};
  QM_RETURN_IF_ERROR(CheckInt8Row(weight));
  return weight;
}

}  // namespace quantmill
