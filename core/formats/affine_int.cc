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
    case Zero::kQ8:
      return "q8";
  }
  return "";
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
  Shape group_shape;
  const Tensor* codes = nullptr;
  const Tensor* scale = nullptr;
  const Tensor* scale_range = nullptr;  // null unless scales are bytes
  const Tensor* zero = nullptr;         // null for Zero::kNone
  const Tensor* zero_range = nullptr;   // null unless Zero::kQ8
  const Tensor* group_index = nullptr;  // null when absent

  int64_t group_count() const { return group_shape.elements(); }
  // Place of the scale and zero point of w[o, i].
  int64_t GroupAt(int64_t o, int64_t i, int64_t in_features) const {
    if (params.axis == 0) return o % group_shape[0] * in_features + i;
    const int64_t group =
        group_index != nullptr ? group_index->as<int32_t>()[i] : i / (in_features / group_shape[1]);
    return o * group_shape[1] + group;
  }
  float Scale(int64_t at) const {
    if (scale_range == nullptr) return LoadFloat(*scale, at);
    const float* range = scale_range->as<float>() + at / kQ8Block * 2;
    return range[1] + range[0] * static_cast<float>(scale->as<uint8_t>()[at]);
  }
  float ZeroPoint(int64_t at) const {
    switch (params.zero) {
      case Zero::kNone:
        return static_cast<float>(1 << (params.bits - 1));
      case Zero::kInt:
        return zero->as<uint8_t>()[at];
      case Zero::kFloat:
        return LoadFloat(*zero, at);
      case Zero::kQ8:
        break;
    }
    const float* range = zero_range->as<float>();
    return range[1] + range[0] * static_cast<float>(zero->as<uint8_t>()[at]);
  }
};

// Scale and zero point tensors, with the ranges of those stored as bytes.
absl::Status FindScaleZero(const PackedWeight& weight, Parts* parts) {
  const Shape& shape = parts->group_shape;
  const std::initializer_list<DType> floats = {DType::kF16, DType::kBF16, DType::kF32};
  const auto part = [&](const char* name, Shape want, std::initializer_list<DType> dtypes,
                        const Tensor** out) {
    absl::StatusOr<const Tensor*> found = Part(weight, name, want, dtypes);
    if (found.ok()) *out = *found;
    return found.status();
  };
  if (parts->params.q8_scale) {
    const int64_t blocks = (shape.elements() + kQ8Block - 1) / kQ8Block;
    QM_RETURN_IF_ERROR(part("scale", shape, {DType::kU8}, &parts->scale));
    QM_RETURN_IF_ERROR(part("scale_range", {blocks, 2}, {DType::kF32}, &parts->scale_range));
  } else {
    QM_RETURN_IF_ERROR(part("scale", shape, floats, &parts->scale));
  }
  switch (parts->params.zero) {
    case Zero::kNone:
      return absl::OkStatus();
    case Zero::kInt:
      return part("zero", shape, {DType::kU8}, &parts->zero);
    case Zero::kFloat:
      return part("zero", shape, floats, &parts->zero);
    case Zero::kQ8:
      break;
  }
  QM_RETURN_IF_ERROR(part("zero", shape, {DType::kU8}, &parts->zero));
  return part("zero_range", {1, 2}, {DType::kF32}, &parts->zero_range);
}

bool KnownTensor(const std::string& name, const AffineIntParams& params) {
  if (name == "codes" || name == "scale") return true;
  if (name == "zero") return params.zero != Zero::kNone;
  if (name == "scale_range") return params.q8_scale;
  if (name == "zero_range") return params.zero == Zero::kQ8;
  return name == "group_index" && params.axis == 1;
}

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
  const int64_t grouped = parts.params.axis == 1 ? in : out;
  if (parts.params.group_size != -1 && grouped % parts.params.group_size != 0) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "group_size %d does not divide %s %d; use a divisor or -1", parts.params.group_size,
        parts.params.axis == 1 ? "in_features" : "out_features", grouped));
  }
  parts.group_shape = parts.params.GroupShape(out, in);
  QM_ASSIGN_OR_RETURN(
      parts.codes, Part(weight, "codes", {out, PackedWords(in, parts.params.bits)}, {DType::kI32}));
  QM_RETURN_IF_ERROR(FindScaleZero(weight, &parts));
  if (weight.Find("group_index") != nullptr) {
    QM_ASSIGN_OR_RETURN(parts.group_index, Part(weight, "group_index", {in}, {DType::kI32}));
  }
  std::set<std::string> seen;
  for (const NamedTensor& named : weight.tensors) {
    if (!KnownTensor(named.name, parts.params)) {
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
  const int64_t columns = parts.group_shape[1];
  for (int64_t i = 0; i < parts.group_count(); ++i) {
    const float scale = parts.Scale(i);
    if (!std::isfinite(scale) || scale <= 0) {
      return absl::InvalidArgumentError(
          absl::StrFormat("scale of row %d, group %d is %g; scales must be positive and finite",
                          i / columns, i % columns, scale));
    }
    const bool is_int = parts.params.zero == Zero::kInt;
    const float zero = parts.ZeroPoint(i);
    if (!std::isfinite(zero) || (is_int && zero >= static_cast<float>(1 << bits))) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "zero point of row %d, group %d is %g; it must be %s", i / columns, i % columns, zero,
          is_int ? absl::StrFormat("0..%d", (1 << bits) - 1) : "finite"));
    }
  }
  for (int64_t i = 0; parts.group_index != nullptr && i < weight.in_features; ++i) {
    const int32_t group = parts.group_index->as<int32_t>()[i];
    if (group < 0 || group >= columns) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "group_index of channel %d is %d; it must be 0..%d", i, group, columns - 1));
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

}  // namespace

std::string AffineIntJson(const AffineIntParams& params) {
  return absl::StrFormat(R"({%s"bits":%d,"group_size":%d,%s"zero":"%s"})",
                         params.axis == 0 ? R"("axis":0,)" : "", params.bits, params.group_size,
                         params.q8_scale ? R"("scale":"q8",)" : "", ZeroName(params.zero));
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
    if (key != "axis" && key != "bits" && key != "group_size" && key != "scale" && key != "zero") {
      return error(absl::StrFormat("unknown key '%s'", key));
    }
  }
  AffineIntParams params;
  const auto bits = json.find("bits");
  if (bits == json.end() || !bits->is_number_integer()) return error("'bits' must be an integer");
  const int64_t wide_bits = bits->get<int64_t>();
  if (wide_bits != 1 && wide_bits != 2 && wide_bits != 3 && wide_bits != 4 && wide_bits != 8) {
    return error("'bits' must be 1, 2, 3, 4 or 8");
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
  bool known = false;
  for (const Zero kind : {Zero::kNone, Zero::kInt, Zero::kFloat, Zero::kQ8}) {
    if (*zero != ZeroName(kind)) continue;
    params.zero = kind;
    known = true;
  }
  if (!known) return error("'zero' must be none, int, float or q8");
  if (params.bits == 1 && (params.zero == Zero::kNone || params.zero == Zero::kInt)) {
    return error("1 bit needs 'zero' float or q8");
  }
  if (json.contains("axis")) {
    if (json["axis"] != 0) return error("'axis' must be 0 or left out");
    params.axis = 0;
  }
  if (json.contains("scale")) {
    if (json["scale"] != "q8") return error("'scale' must be q8 or left out");
    params.q8_scale = true;
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
  for (int64_t o = 0; o < rows; ++o) {
    const int32_t* row = parts.codes->as<int32_t>() + o * words;
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t at = parts.GroupAt(o, i, columns);
      const float code = static_cast<float>(CodeAt(row, i, bits));
      StoreFloat(*out, o * columns + i, parts.Scale(at) * (code - parts.ZeroPoint(at)));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<PackedWeight> MakeAffineInt(const AffineIntParams& params, const Tensor& codes,
                                           const Tensor& scale, const Tensor& zero,
                                           const Tensor& group_index, const Tensor& scale_range,
                                           const Tensor& zero_range) {
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
  if (!scale_range.empty()) weight.tensors.push_back({"scale_range", scale_range});
  if (!zero_range.empty()) weight.tensors.push_back({"zero_range", zero_range});
  QM_RETURN_IF_ERROR(CheckAffineInt(weight));
  return weight;
}

}  // namespace quantmill
