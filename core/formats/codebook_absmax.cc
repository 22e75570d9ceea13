#include "core/formats/codebook_absmax.h"

#include <cmath>
#include <initializer_list>
#include <set>
#include <vector>

#include "absl/strings/str_format.h"
#include "core/base/status.h"
#include "core/tensor/dtype.h"
#include "nlohmann/json.hpp"

namespace quantmill {
namespace {

using Type = CodebookAbsmaxParams::Type;

constexpr int64_t kCodebook = 16, kNestedCodebook = 256;
constexpr int64_t kLargestNestedBlock = 1 << 20;

const char* DTypeText(DType dtype) {
  return dtype == DType::kBF16 ? "bf16" : dtype == DType::kF16 ? "f16" : "f32";
}

struct StoredTensor {
  const char* name;
  DType dtype;
  int64_t elements;
};

std::vector<StoredTensor> StoredTensors(const CodebookAbsmaxParams& p, int64_t weights) {
  const bool nested = p.nested_block_size > 0;
  std::vector<StoredTensor> stored = {
      {"codes", DType::kU8, (weights + 1) / 2},
      {"absmax", nested ? DType::kU8 : DType::kF32, p.Blocks(weights)},
      {"codebook", DType::kF32, kCodebook},
  };
  if (nested) {
    stored.push_back({"nested_absmax", DType::kF32, p.NestedBlocks(weights)});
    stored.push_back({"nested_codebook", DType::kF32, kNestedCodebook});
    stored.push_back({"absmax_offset", DType::kF32, 1});
  }
  return stored;
}

absl::Status CheckStored(const PackedWeight& weight, const StoredTensor& expected) {
  const Tensor* tensor = weight.Find(expected.name);
  if (tensor == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrFormat("codebook-absmax weight has no tensor '%s'", expected.name));
  }
  if (tensor->dtype() != expected.dtype || !(tensor->shape() == Shape({expected.elements})) ||
      !tensor->device().is_cpu()) {
    return absl::InvalidArgumentError(
        ErrorText(absl::StrFormat("tensor '%s' of a codebook-absmax weight is %s %s", expected.name,
                                  DTypeName(tensor->dtype()), tensor->shape().ToString()),
                  absl::StrFormat("expected %s [%d] in host memory", DTypeName(expected.dtype),
                                  expected.elements)));
  }
  if (expected.dtype != DType::kF32) return absl::OkStatus();
  for (int64_t i = 0; i < expected.elements; ++i) {
    if (std::isfinite(tensor->as<float>()[i])) continue;
    return absl::InvalidArgumentError(
        absl::StrFormat("element %d of '%s' is NaN or infinite", i, expected.name));
  }
  return absl::OkStatus();
}

absl::StatusOr<CodebookAbsmaxParams> CheckedParams(const PackedWeight& weight) {
  if (weight.format_id != kCodebookAbsmaxId) {
    return absl::InvalidArgumentError(
        absl::StrFormat("weight has format %s, expected %s", weight.format_id, kCodebookAbsmaxId));
  }
  QM_ASSIGN_OR_RETURN(const CodebookAbsmaxParams params,
                      ParseCodebookAbsmaxJson(weight.format_json));
  if (weight.out_features < 1 || weight.in_features < 1) {
    return absl::InvalidArgumentError(absl::StrFormat("features [%d, %d] must be positive",
                                                      weight.out_features, weight.in_features));
  }
  std::set<std::string> allowed;
  for (const StoredTensor& expected :
       StoredTensors(params, weight.out_features * weight.in_features)) {
    QM_RETURN_IF_ERROR(CheckStored(weight, expected));
    allowed.insert(expected.name);
  }
  for (const NamedTensor& named : weight.tensors) {
    if (allowed.erase(named.name) == 1) continue;
    return absl::InvalidArgumentError(
        absl::StrFormat("codebook-absmax weight with parameters %s has a tensor '%s' it should not "
                        "have, or has it twice",
                        weight.format_json, named.name));
  }
  return params;
}

// The factor of block b.
float BlockAbsmax(const PackedWeight& weight, const CodebookAbsmaxParams& params, int64_t b) {
  const Tensor& absmax = *weight.Find("absmax");
  if (params.nested_block_size == 0) return absmax.as<float>()[b];
  const float value = weight.Find("nested_codebook")->as<float>()[absmax.as<uint8_t>()[b]];
  const float range = weight.Find("nested_absmax")->as<float>()[b / params.nested_block_size];
  const float product = value * range;  // rounded before the sum
  return product + weight.Find("absmax_offset")->as<float>()[0];
}

}  // namespace

std::string CodebookAbsmaxJson(const CodebookAbsmaxParams& params) {
  const std::string nested =
      params.nested_block_size == 0
          ? ""
          : absl::StrFormat(R"("nested_block_size":%d,)", params.nested_block_size);
  return absl::StrFormat(R"({"block_size":%d,"dtype":"%s",%s"type":"%s"})", params.block_size,
                         DTypeText(params.dtype), nested,
                         params.type == Type::kNf4 ? "nf4" : "fp4");
}

absl::StatusOr<CodebookAbsmaxParams> ParseCodebookAbsmaxJson(std::string_view text) {
  const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  const auto error = [&](const std::string& why) {
    return absl::InvalidArgumentError(ErrorText(
        absl::StrFormat("parameters '%s' are not those of codebook-absmax", AbslView(text)), why,
        R"(expected e.g. {"block_size":64,"dtype":"bf16","type":"nf4"})"));
  };
  if (!json.is_object()) return error("not a JSON object");
  CodebookAbsmaxParams params;
  const auto integer = [&](const char* key, int64_t* out) {
    const auto found = json.find(key);
    if (found == json.end() || !found->is_number_integer()) return false;
    *out = found->get<int64_t>();
    return true;
  };
  const int64_t& size = params.block_size;
  if (!integer("block_size", &params.block_size) || size < 32 || size > 4096 ||
      (size & (size - 1)) != 0) {
    return error("'block_size' must be a power of two from 32 to 4096");
  }
  if (json.contains("nested_block_size") &&
      (!integer("nested_block_size", &params.nested_block_size) || params.nested_block_size < 1 ||
       params.nested_block_size > kLargestNestedBlock)) {
    return error("'nested_block_size' must be a positive integer, or left out");
  }
  const std::string dtype = json.contains("dtype") && json["dtype"].is_string()
                                ? json["dtype"].get<std::string>()
                                : std::string();
  params.dtype = dtype == "f32" ? DType::kF32 : dtype == "f16" ? DType::kF16 : DType::kBF16;
  if (dtype != DTypeText(params.dtype)) return error("'dtype' must be bf16, f16 or f32");
  if (json.contains("type") && json["type"] == "fp4") params.type = Type::kFp4;
  if (!json.contains("type") || (json["type"] != "fp4" && json["type"] != "nf4")) {
    return error("'type' must be nf4 or fp4");
  }
  if (CodebookAbsmaxJson(params) != text) {
    return error("keys must be sorted, without spaces, and no others than these");
  }
  return params;
}

absl::Status CheckCodebookAbsmax(const PackedWeight& weight) {
  return CheckedParams(weight).status();
}

absl::Status DequantizeCodebookAbsmaxReference(const PackedWeight& weight, Tensor* out) {
  QM_ASSIGN_OR_RETURN(const CodebookAbsmaxParams params, CheckedParams(weight));
  if (!(out->shape() == Shape({weight.out_features, weight.in_features})) ||
      !out->device().is_cpu()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("the dense weight must be [%d, %d] in host memory", weight.out_features,
                        weight.in_features));
  }
  if (out->dtype() != DType::kF32 && out->dtype() != DType::kF16 && out->dtype() != DType::kBF16) {
    return absl::InvalidArgumentError("the dense weight must be F32, F16 or BF16");
  }
  const uint8_t* codes = weight.Find("codes")->as<uint8_t>();
  const float* codebook = weight.Find("codebook")->as<float>();
  for (int64_t i = 0; i < out->elements(); ++i) {
    const int code = i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15;
    StoreFloat(*out, i, codebook[code] * BlockAbsmax(weight, params, i / params.block_size));
  }
  return absl::OkStatus();
}

}  // namespace quantmill
