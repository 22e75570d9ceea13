#include "core/formats/row_parts.h"

#include <cmath>

#include "absl/strings/str_format.h"
#include "core/base/status.h"

namespace quantmill {
namespace {

absl::StatusOr<const Tensor*> Part(const PackedWeight& weight, std::string_view name, Shape shape) {
  const Tensor* tensor = weight.Find(name);
  if (tensor == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrFormat("a weight of %s has no tensor '%s'", weight.format_id, name));
  }
  if (!(tensor->shape() == shape)) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrFormat("tensor '%s' of a weight of %s has shape %s", name,
                                  weight.format_id, tensor->shape().ToString()),
                  absl::StrFormat("the features and parameters ask for %s", shape.ToString())));
  }
  if (!tensor->device().is_cpu()) {
    return absl::InvalidArgumentError(absl::StrFormat("tensor '%s' is not in host memory", name));
  }
  return tensor;
}

absl::Status WrongDType(const PackedWeight& weight, std::string_view name, const Tensor& tensor) {
  return absl::InvalidArgumentError(absl::StrFormat("tensor '%s' of a weight of %s has dtype %s",
                                                    name, weight.format_id,
                                                    DTypeName(tensor.dtype())));
}

}  // namespace

absl::StatusOr<RowParts> FindRowParts(const PackedWeight& weight, DType dtype, int64_t scales) {
  if (weight.out_features < 1 || weight.in_features < 1) {
    return absl::InvalidArgumentError(
        absl::StrFormat("a weight of %s has features [%d, %d]; both must be positive",
                        weight.format_id, weight.out_features, weight.in_features));
  }
  RowParts parts = {};
  QM_ASSIGN_OR_RETURN(parts.codes,
                      Part(weight, "codes", {weight.out_features, weight.in_features}));
  QM_ASSIGN_OR_RETURN(parts.scale, Part(weight, "scale", Shape({scales})));
  if (weight.tensors.size() != 2) {
    return absl::InvalidArgumentError(
        absl::StrFormat("a weight of %s has %d tensors instead of codes and scale",
                        weight.format_id, static_cast<int64_t>(weight.tensors.size())));
  }
  if (parts.codes->dtype() != dtype) return WrongDType(weight, "codes", *parts.codes);
  if (!IsModelFloat(parts.scale->dtype())) return WrongDType(weight, "scale", *parts.scale);
  for (int64_t i = 0; i < scales; ++i) {
    const float scale = LoadFloat(*parts.scale, i);
    if (std::isfinite(scale) && scale > 0) continue;
    return absl::InvalidArgumentError(
        absl::StrFormat("scale %d of a weight of %s is %g; scales must be positive and finite", i,
                        weight.format_id, scale));
  }
  return parts;
}

absl::Status CheckDenseTarget(const PackedWeight& weight, const Tensor& out) {
  if (out.shape() == Shape({weight.out_features, weight.in_features}) &&
      IsModelFloat(out.dtype()) && out.device().is_cpu()) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      ErrorText(absl::StrFormat("dequantizing a weight of %s needs a host tensor [out, in] in F32, "
                                "F16 or BF16",
                                weight.format_id),
                absl::StrFormat("got %s %s", DTypeName(out.dtype()), out.shape().ToString())));
}

}  // namespace quantmill
