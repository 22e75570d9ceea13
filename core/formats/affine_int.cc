#include "core/formats/affine_int.h"

#include <cmath>
#include <set>
#include <utility>

#include "absl/strings/str_format.h"
#include "core/base/status.h"
#include "nlohmann/json.hpp"

namespace quantmill {
namespace {

using Zero = AffineIntParams::Zero;

const char* ZeroName(Zero zero) {
  switch (zero) {
    case Zero::kNone:
      return "none";
    case Zero::kInt:
      return "int";
    case Zero::kFloat:
      return "float";
  }
  return "";
}

float LoadFloat(const Tensor& tensor, int64_t index) {
  switch (tensor.dtype()) {
    case DType::kF16:
      return F16ToF32(tensor.as<uint16_t>()[index]);
    case DType::kBF16:
      return BF16ToF32(tensor.as<uint16_t>()[index]);
    default:
      return tensor.as<float>()[index];
  }
}

void StoreFloat(Tensor* tensor, int64_t index, float value) {
  switch (tensor->dtype()) {
    case DType::kF16:
      tensor->as<uint16_t>()[index] = F32ToF16(value);
      break;
    case DType::kBF16:
      tensor->as<uint16_t>()[index] = F32ToBF16(value);
      break;
    default:
      tensor->as<float>()[index] = value;
  }
}

uint32_t CodeAt(const int32_t* words, int64_t index, int bits) {
  uint32_t code = 0;
  for (int b = 0; b < bits; ++b) {
    const int64_t bit = index * bits + b;
    const uint32_t word = static_cast<uint32_t>(words[bit / 32]);
    code |= ((word >> (bit % 32)) & 1u) << b;
  }
  return code;
}

// A tensor of the weight that must be on the host with this shape and one of these dtypes.
absl::StatusOr<const Tensor*> Part(const PackedWeight& weight, std::string_view name, Shape shape,
                                   std::initializer_list<DType> dtypes) {
  const Tensor* tensor = weight.Find(name);
  if (tensor == nullptr) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrFormat("affine-int weight has no tensor '%s'", name)));
  }
  bool known = false;
  for (DType dtype : dtypes) known = known || tensor->dtype() == dtype;
  if (!known) {
    return absl::InvalidArgumentError(ErrorText(absl::StrFormat(
        "tensor '%s' of an affine-int weight has dtype %s", name, DTypeName(tensor->dtype()))));
  }
  if (!(tensor->shape() == shape)) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrFormat("tensor '%s' of an affine-int weight has shape %s", name,
                                  tensor->shape().ToString()),
                  absl::StrFormat("the parameters ask for %s", shape.ToString())));
  }
  if (!tensor->device().is_cpu()) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrFormat("tensor '%s' is not in host memory", name)));
  }
  return tensor;
}

struct Parts {
  AffineIntParams params;
  int64_t groups = 0;
  const Tensor* codes = nullptr;
  const Tensor* scale = nullptr;
  const Tensor* zero = nullptr;         // null for Zero::kNone
  const Tensor* group_index = nullptr;  // null when absent
};

absl::StatusOr<Parts> FindParts(const PackedWeight& weight) {
  if (weight.format_id != kAffineIntId) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrFormat("weight has format '%s'", weight.format_id),
                  absl::StrFormat("expected '%s'", kAffineIntId)));
  }
  Parts parts;
  QM_ASSIGN_OR_RETURN(parts.params, ParseAffineIntJson(weight.format_json));
  const int64_t out = weight.out_features, in = weight.in_features;
  if (out < 1 || in < 1) {
    return absl::InvalidArgumentError(
        absl::StrFormat("affine-int weight has features [%d, %d]; both must be positive", out, in));
  }
  if (parts.params.group_size != -1 && in % parts.params.group_size != 0) {
    return absl::InvalidArgumentError(
        absl::StrFormat("group_size %d does not divide in_features %d; use a divisor or -1",
                        parts.params.group_size, in));
  }
  parts.groups = parts.params.Groups(in);
  QM_ASSIGN_OR_RETURN(
      parts.codes, Part(weight, "codes", {out, PackedWords(in, parts.params.bits)}, {DType::kI32}));
  QM_ASSIGN_OR_RETURN(parts.scale, Part(weight, "scale", {out, parts.groups},
                                        {DType::kF16, DType::kBF16, DType::kF32}));
  if (parts.params.zero == Zero::kInt) {
    QM_ASSIGN_OR_RETURN(parts.zero, Part(weight, "zero", {out, parts.groups}, {DType::kU8}));
  } else if (parts.params.zero == Zero::kFloat) {
    QM_ASSIGN_OR_RETURN(parts.zero,
                        Part(weight, "zero", {out, parts.groups}, {DType::kF16, DType::kF32}));
  }
  if (weight.Find("group_index") != nullptr) {
    QM_ASSIGN_OR_RETURN(parts.group_index, Part(weight, "group_index", {in}, {DType::kI32}));
  }
  std::set<std::string> seen;
  for (const NamedTensor& named : weight.tensors) {
    const bool known = named.name == "codes" || named.name == "scale" ||
                       named.name == "group_index" ||
                       (named.name == "zero" && parts.params.zero != Zero::kNone);
    if (!known) {
      return absl::InvalidArgumentError(
          ErrorText(absl::StrFormat("affine-int weight has a tensor '%s'", named.name),
                    absl::StrFormat("its parameters are %s", weight.format_json)));
    }
    if (!seen.insert(named.name).second) {
      return absl::InvalidArgumentError(
          absl::StrFormat("affine-int weight has two tensors '%s'", named.name));
    }
  }
  return parts;
}

absl::Status CheckValues(const PackedWeight& weight, const Parts& parts) {
  const int bits = parts.params.bits;
  for (int64_t i = 0; i < parts.scale->elements(); ++i) {
    const float scale = LoadFloat(*parts.scale, i);
    if (!std::isfinite(scale) || scale <= 0) {
      return absl::InvalidArgumentError(
          absl::StrFormat("scale of row %d, group %d is %g; scales must be positive and finite",
                          i / parts.groups, i % parts.groups, scale));
    }
  }
  for (int64_t i = 0; parts.zero != nullptr && i < parts.zero->elements(); ++i) {
    const bool is_int = parts.params.zero == Zero::kInt;
    const float zero = is_int ? parts.zero->as<uint8_t>()[i] : LoadFloat(*parts.zero, i);
    if (!std::isfinite(zero) || (is_int && zero >= static_cast<float>(1 << bits))) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "zero point of row %d, group %d is %g; it must be %s", i / parts.groups, i % parts.groups,
          zero, is_int ? absl::StrFormat("0..%d", (1 << bits) - 1) : "finite"));
    }
  }
  for (int64_t i = 0; parts.group_index != nullptr && i < weight.in_features; ++i) {
    const int32_t group = parts.group_index->as<int32_t>()[i];
    if (group < 0 || group >= parts.groups) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "group_index of channel %d is %d; it must be 0..%d", i, group, parts.groups - 1));
    }
  }
  const int64_t words = PackedWords(weight.in_features, bits);
  const int used = static_cast<int>(weight.in_features * bits - (words - 1) * 32);
  for (int64_t o = 0; used < 32 && o < weight.out_features; ++o) {
    const uint32_t last = static_cast<uint32_t>(parts.codes->as<int32_t>()[(o + 1) * words - 1]);
    if ((last >> used) != 0) {
      return absl::InvalidArgumentError(
          absl::StrFormat("codes of row %d have unused bits set; they must be 0", o));
    }
  }
  return absl::OkStatus();
}

class ReferenceKernel : public PackedKernel {
 public:
  explicit ReferenceKernel(Backend& backend) : backend_(backend) {}

  absl::Status Dequantize(const PackedWeight& weight, Tensor* out) override {
    PackedWeight host = weight;
    for (NamedTensor& named : host.tensors) {
      if (named.tensor.device().is_cpu()) continue;
      QM_ASSIGN_OR_RETURN(Tensor copy, Tensor::Host(named.tensor.dtype(), named.tensor.shape()));
      QM_RETURN_IF_ERROR(backend_.Copy(named.tensor, &copy));
      named.tensor = copy;
    }
    if (out->device().is_cpu()) return DequantizeAffineIntReference(host, out);
    QM_ASSIGN_OR_RETURN(Tensor dense, Tensor::Host(out->dtype(), out->shape()));
    QM_RETURN_IF_ERROR(DequantizeAffineIntReference(host, &dense));
    QM_RETURN_IF_ERROR(backend_.Copy(dense, out));
    return backend_.Synchronize();  // `dense` must outlive the copy
  }

  absl::StatusOr<PackedWeight> Prepack(const PackedWeight& weight) override { return weight; }

  absl::Status MatMul(const PackedWeight&, const Tensor&, Tensor*) override {
    return absl::UnimplementedError("the reference kernel only dequantizes");
  }

 private:
  Backend& backend_;
};

}  // namespace

std::string AffineIntJson(const AffineIntParams& params) {
  return absl::StrFormat(R"({"bits":%d,"group_size":%d,"zero":"%s"})", params.bits,
                         params.group_size, ZeroName(params.zero));
}

absl::StatusOr<AffineIntParams> ParseAffineIntJson(std::string_view text) {
  const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  const auto error = [&](const std::string& why) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrFormat("parameters '%s' are not those of affine-int", text), why,
                  R"(expected e.g. {"bits":4,"group_size":128,"zero":"int"})"));
  };
  if (!json.is_object()) return error("not a JSON object");
  for (const auto& [key, value] : json.items()) {
    if (key != "bits" && key != "group_size" && key != "zero") {
      return error(absl::StrFormat("unknown key '%s'", key));
    }
  }
  AffineIntParams params;
  const auto bits = json.find("bits");
  if (bits == json.end() || !bits->is_number_integer()) return error("'bits' must be an integer");
  const int64_t wide_bits = bits->get<int64_t>();
  if (wide_bits != 2 && wide_bits != 3 && wide_bits != 4 && wide_bits != 8) {
    return error("'bits' must be 2, 3, 4 or 8");
  }
  params.bits = static_cast<int>(wide_bits);
  const auto group = json.find("group_size");
  if (group == json.end() || !group->is_number_integer()) {
    return error("'group_size' must be an integer");
  }
  params.group_size = group->get<int64_t>();
  if (params.group_size != -1 && params.group_size < 1) {
    return error("'group_size' must be -1 or positive");
  }
  const auto zero = json.find("zero");
  if (zero == json.end() || !zero->is_string()) return error("'zero' must be a string");
  if (*zero == "none") {
    params.zero = Zero::kNone;
  } else if (*zero == "int") {
    params.zero = Zero::kInt;
  } else if (*zero == "float") {
    params.zero = Zero::kFloat;
  } else {
    return error("'zero' must be none, int or float");
  }
  if (AffineIntJson(params) != text) return error("keys must be sorted, without spaces");
  return params;
}

int64_t PackedWords(int64_t count, int bits) { return (count * bits + 31) / 32; }

void PackBits(const uint8_t* values, int64_t count, int bits, int32_t* words) {
  const int64_t word_count = PackedWords(count, bits);
  for (int64_t w = 0; w < word_count; ++w) words[w] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t bit = i * bits;
    const uint64_t field = static_cast<uint64_t>(values[i]) << (bit % 32);
    words[bit / 32] |= static_cast<int32_t>(static_cast<uint32_t>(field));
    const uint32_t spill = static_cast<uint32_t>(field >> 32);
    if (spill != 0) words[bit / 32 + 1] |= static_cast<int32_t>(spill);
  }
}

void UnpackBits(const int32_t* words, int64_t count, int bits, uint8_t* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<uint8_t>(CodeAt(words, i, bits));
}

absl::Status CheckAffineInt(const PackedWeight& weight) {
  QM_ASSIGN_OR_RETURN(Parts parts, FindParts(weight));
  return CheckValues(weight, parts);
}

absl::Status DequantizeAffineIntReference(const PackedWeight& weight, Tensor* out) {
  QM_ASSIGN_OR_RETURN(Parts parts, FindParts(weight));
  QM_RETURN_IF_ERROR(CheckValues(weight, parts));
  const int64_t rows = weight.out_features, columns = weight.in_features;
  if (!(out->shape() == Shape({rows, columns})) || !IsModelFloat(out->dtype()) ||
      !out->device().is_cpu()) {
    return absl::InvalidArgumentError(
        ErrorText("dequantizing affine-int needs a host tensor [out, in] in F32, F16 or BF16",
                  absl::StrFormat("got %s %s", DTypeName(out->dtype()), out->shape().ToString())));
  }
  const int bits = parts.params.bits;
  const int64_t words = PackedWords(columns, bits);
  const int64_t group_size = columns / parts.groups;
  for (int64_t o = 0; o < rows; ++o) {
    const int32_t* row = parts.codes->as<int32_t>() + o * words;
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t group =
          parts.group_index ? parts.group_index->as<int32_t>()[i] : i / group_size;
      const int64_t at = o * parts.groups + group;
      float zero = static_cast<float>(1 << (bits - 1));
      if (parts.params.zero == Zero::kInt) zero = parts.zero->as<uint8_t>()[at];
      if (parts.params.zero == Zero::kFloat) zero = LoadFloat(*parts.zero, at);
      const float code = static_cast<float>(CodeAt(row, i, bits));
      StoreFloat(out, o * columns + i, LoadFloat(*parts.scale, at) * (code - zero));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<PackedWeight> MakeAffineInt(const AffineIntParams& params, const Tensor& codes,
                                           const Tensor& scale, const Tensor& zero,
                                           const Tensor& group_index) {
  if (codes.rank() != 2 || codes.dtype() != DType::kU8 || !codes.device().is_cpu()) {
    return absl::InvalidArgumentError("unpacked codes must be U8 [out, in] in host memory");
  }
  PackedWeight weight;
  weight.format_id = std::string(kAffineIntId);
  weight.format_json = AffineIntJson(params);
  weight.out_features = codes.dim(0);
  weight.in_features = codes.dim(1);
  const int64_t words = PackedWords(weight.in_features, params.bits);
  for (int64_t i = 0; i < codes.elements(); ++i) {
    if (codes.as<uint8_t>()[i] >> params.bits != 0) {
      return absl::InvalidArgumentError(
          absl::StrFormat("code %d does not fit %d bits", codes.as<uint8_t>()[i], params.bits));
    }
  }
  QM_ASSIGN_OR_RETURN(Tensor packed, Tensor::Host(DType::kI32, {weight.out_features, words}));
  for (int64_t o = 0; o < weight.out_features; ++o) {
    PackBits(codes.as<uint8_t>() + o * weight.in_features, weight.in_features, params.bits,
             packed.as<int32_t>() + o * words);
  }
  weight.tensors.push_back({"codes", packed});
  weight.tensors.push_back({"scale", scale});
  if (!zero.empty()) weight.tensors.push_back({"zero", zero});
  if (!group_index.empty()) weight.tensors.push_back({"group_index", group_index});
  QM_RETURN_IF_ERROR(CheckAffineInt(weight));
  return weight;
}

std::shared_ptr<PackedKernel> MakeReferencePackedKernel(Backend& backend) {
  return std::make_shared<ReferenceKernel>(backend);
}

}  // namespace quantmill
