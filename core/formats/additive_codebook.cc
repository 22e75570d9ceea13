#include "core/formats/additive_codebook.h"

#include <cmath>
#include <set>

#include "absl/strings/str_format.h"
#include "core/base/status.h"
#include "core/tensor/dtype.h"
#include "nlohmann/json.hpp"

namespace quantmill {
namespace {

struct AdditiveParts {
  AdditiveCodebookParams params;
  int64_t groups = 0;  // per row
  const Tensor* codes = nullptr;
  const Tensor* codebooks = nullptr;
  const Tensor* scales = nullptr;

  // As stored: two's complement of the index.
  int64_t Code(int64_t at) const {
    return codes->dtype() == DType::kI8 ? int64_t{codes->as<int8_t>()[at]}
                                        : int64_t{codes->as<int16_t>()[at]};
  }
  int64_t Index(int64_t at) const { return Code(at) & (params.codebook_length() - 1); }
};

absl::StatusOr<const Tensor*> AdditivePart(const PackedWeight& weight, std::string_view name,
                                           Shape shape, std::initializer_list<DType> dtypes) {
  const Tensor* tensor = weight.Find(name);
  if (tensor == nullptr) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrFormat("additive-codebook weight has no tensor '%s'", name)));
  }
  bool known = false;
  for (DType dtype : dtypes) known = known || tensor->dtype() == dtype;
  if (!known || !(tensor->shape() == shape) || !tensor->device().is_cpu()) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrFormat("tensor '%s' of an additive-codebook weight is %s %s", name,
                                  DTypeName(tensor->dtype()), tensor->shape().ToString()),
                  absl::StrFormat("the parameters %s ask for shape %s in host memory",
                                  weight.format_json, shape.ToString())));
  }
  return tensor;
}

absl::StatusOr<AdditiveParts> FindAdditiveParts(const PackedWeight& weight) {
  if (weight.format_id != kAdditiveCodebookId) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrFormat("weight has format '%s'", weight.format_id),
                  absl::StrFormat("expected '%s'", kAdditiveCodebookId)));
  }
  AdditiveParts parts;
  QM_ASSIGN_OR_RETURN(parts.params, ParseAdditiveCodebookJson(weight.format_json));
  const AdditiveCodebookParams& p = parts.params;
  const int64_t out = weight.out_features, in = weight.in_features;
  if (out < 1 || in < 1 || in % p.group_size != 0) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "additive-codebook weight has features [%d, %d]; both must be positive, the second a "
        "multiple of group_size %d",
        out, in, p.group_size));
  }
  parts.groups = in / p.group_size;
  QM_ASSIGN_OR_RETURN(parts.codes, AdditivePart(weight, "codes", {out, parts.groups, p.codebooks},
                                                {p.code_dtype()}));
  const std::initializer_list<DType> floats = {DType::kF16, DType::kBF16, DType::kF32};
  QM_ASSIGN_OR_RETURN(
      parts.codebooks,
      AdditivePart(weight, "codebooks", {p.codebooks, p.codebook_length(), p.group_size}, floats));
  QM_ASSIGN_OR_RETURN(parts.scales, AdditivePart(weight, "scales", {out}, floats));
  std::set<std::string> seen;
  for (const NamedTensor& named : weight.tensors) {
    if (named.name != "codes" && named.name != "codebooks" && named.name != "scales") {
      return absl::InvalidArgumentError(
          absl::StrFormat("additive-codebook weight has a tensor '%s'", named.name));
    }
    if (!seen.insert(named.name).second) {
      return absl::InvalidArgumentError(
          absl::StrFormat("additive-codebook weight has two tensors '%s'", named.name));
    }
  }
  return parts;
}

absl::Status CheckAdditiveValues(const AdditiveParts& parts) {
  const int64_t half = parts.params.codebook_length() / 2;
  for (int64_t i = 0; i < parts.codes->elements(); ++i) {
    if (parts.Code(i) < -half || parts.Code(i) >= half) {
      return absl::InvalidArgumentError(
          absl::StrFormat("code %d is %d; with %d bits codes are %d..%d", i, parts.Code(i),
                          parts.params.index_bits, -half, half - 1));
    }
  }
  for (const Tensor* tensor : {parts.codebooks, parts.scales}) {
    for (int64_t i = 0; i < tensor->elements(); ++i) {
      if (std::isfinite(LoadFloat(*tensor, i))) continue;
      return absl::InvalidArgumentError(
          absl::StrFormat("value %d of tensor '%s' is %g; it must be finite", i,
                          tensor == parts.scales ? "scales" : "codebooks", LoadFloat(*tensor, i)));
    }
  }
  return absl::OkStatus();
}

}  // namespace

std::string AdditiveCodebookJson(const AdditiveCodebookParams& params) {
  return absl::StrFormat(R"({"codebooks":%d,"group_size":%d,"index_bits":%d})", params.codebooks,
                         params.group_size, params.index_bits);
}

absl::StatusOr<AdditiveCodebookParams> ParseAdditiveCodebookJson(std::string_view text) {
  const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  const auto error = [&](const std::string& why) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrFormat("parameters '%s' are not those of additive-codebook", text), why,
                  R"(expected e.g. {"codebooks":2,"group_size":8,"index_bits":8})"));
  };
  if (!json.is_object()) return error("not a JSON object");
  const auto read = [&](const char* key, int64_t most, int64_t* out) {
    const auto found = json.find(key);
    if (found == json.end() || !found->is_number_integer()) return false;
    *out = found->get<int64_t>();
    return *out >= 1 && *out <= most;
  };
  int64_t codebooks = 0, index_bits = 0;
  AdditiveCodebookParams params;
  if (!read("codebooks", 16, &codebooks)) return error("'codebooks' must be 1..16");
  if (!read("group_size", 1024, &params.group_size)) return error("'group_size' must be 1..1024");
  if (!read("index_bits", 16, &index_bits)) return error("'index_bits' must be 1..16");
  params.codebooks = static_cast<int>(codebooks);
  params.index_bits = static_cast<int>(index_bits);
  if (AdditiveCodebookJson(params) != text) {
    return error("keys must be these, sorted, without spaces");
  }
  return params;
}

absl::Status CheckAdditiveCodebook(const PackedWeight& weight) {
  QM_ASSIGN_OR_RETURN(const AdditiveParts parts, FindAdditiveParts(weight));
  return CheckAdditiveValues(parts);
}

absl::Status DequantizeAdditiveCodebookReference(const PackedWeight& weight, Tensor* out) {
  QM_ASSIGN_OR_RETURN(const AdditiveParts parts, FindAdditiveParts(weight));
  QM_RETURN_IF_ERROR(CheckAdditiveValues(parts));
  const int64_t rows = weight.out_features, columns = weight.in_features;
  if (!(out->shape() == Shape({rows, columns})) || !IsModelFloat(out->dtype()) ||
      !out->device().is_cpu()) {
    return absl::InvalidArgumentError(
        ErrorText("dequantizing needs a host tensor [out, in] in F32, F16 or BF16",
                  absl::StrFormat("got %s %s", DTypeName(out->dtype()), out->shape().ToString())));
  }
  const AdditiveCodebookParams& p = parts.params;
  for (int64_t o = 0; o < rows; ++o) {
    const float scale = LoadFloat(*parts.scales, o);
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t group = o * parts.groups + i / p.group_size;
      float sum = 0;
      for (int m = 0; m < p.codebooks; ++m) {
        const int64_t vector = m * p.codebook_length() + parts.Index(group * p.codebooks + m);
        sum += LoadFloat(*parts.codebooks, vector * p.group_size + i % p.group_size);
      }
      StoreFloat(*out, o * columns + i, scale * sum);
    }
  }
  return absl::OkStatus();
}

}  // namespace quantmill
