// Weights of qm.fmt.int8-row/1 and qm.fmt.float8/1 drawn at random: all parameters, types of
// scales, widths that vector loads fit and do not fit.
#include <random>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/formats/float8.h"
#include "core/formats/int8_row.h"
#include "core/tensor/dtype.h"
#include "sdk/check/packed_samples.h"

namespace quantmill::check {
namespace {

struct RowShape {
  int64_t out, in;
  DType scale_dtype;
};
constexpr RowShape kShapes[] = {{64, 256, DType::kF16},
                                {128, 192, DType::kF16},
                                {33, 100, DType::kF32},
                                {40, 336, DType::kBF16},
                                {1, 1, DType::kF32}};

// Bytes at random, of 8-bit floats those that stand for finite numbers.
absl::StatusOr<Tensor> RandomCodes(DType dtype, const RowShape& shape, std::mt19937_64& random) {
  QM_ASSIGN_OR_RETURN(Tensor codes, Tensor::Host(dtype, {shape.out, shape.in}));
  uint8_t* bytes = static_cast<uint8_t*>(codes.data());
  const unsigned finite = dtype == DType::kF8E4M3 ? 0x7F : 0x7C;
  for (int64_t i = 0; i < codes.elements(); ++i) {
    const uint64_t bits = random();
    bytes[i] =
        static_cast<uint8_t>(dtype == DType::kI8 ? bits : (bits & 0x80) | ((bits >> 8) % finite));
  }
  return codes;
}

absl::StatusOr<Tensor> RandomScales(int64_t count, DType dtype, std::mt19937_64& random) {
  QM_ASSIGN_OR_RETURN(Tensor scale, Tensor::Host(dtype, Shape({count})));
  for (int64_t i = 0; i < count; ++i) {
    StoreFloat(scale, i, 0.01f + 0.0001f * static_cast<float>(random() % 1000));
  }
  return scale;
}

PackedSample Named(PackedWeight packed, const RowShape& shape) {
  PackedSample sample;
  sample.name = absl::StrCat(packed.format_id, " ", packed.format_json, " [", shape.out, ", ",
                             shape.in, "], scales ", std::string(DTypeName(shape.scale_dtype)));
  sample.packed = std::move(packed);
  return sample;
}

}  // namespace

absl::StatusOr<std::vector<PackedSample>> Int8RowSamples(uint64_t seed) {
  std::vector<PackedSample> samples;
  for (const bool activations : {false, true}) {
    for (const RowShape& shape : kShapes) {
      std::mt19937_64 random(seed++);
      QM_ASSIGN_OR_RETURN(const Tensor codes, RandomCodes(DType::kI8, shape, random));
      QM_ASSIGN_OR_RETURN(const Tensor scale, RandomScales(shape.out, shape.scale_dtype, random));
      QM_ASSIGN_OR_RETURN(PackedWeight packed, MakeInt8Row({activations}, codes, scale));
      samples.push_back(Named(std::move(packed), shape));
    }
  }
  return samples;
}

absl::StatusOr<std::vector<PackedSample>> Float8Samples(uint64_t seed) {
  std::vector<PackedSample> samples;
  for (const Float8Params& params :
       {Float8Params{DType::kF8E4M3, false, false}, Float8Params{DType::kF8E4M3, true, false},
        Float8Params{DType::kF8E4M3, false, true}, Float8Params{DType::kF8E4M3, true, true},
        Float8Params{DType::kF8E5M2, false, false}, Float8Params{DType::kF8E5M2, true, false}}) {
    for (const RowShape& shape : kShapes) {
      std::mt19937_64 random(seed++);
      QM_ASSIGN_OR_RETURN(const Tensor codes, RandomCodes(params.dtype, shape, random));
      QM_ASSIGN_OR_RETURN(const Tensor scale, RandomScales(params.per_tensor ? 1 : shape.out,
                                                           shape.scale_dtype, random));
      QM_ASSIGN_OR_RETURN(PackedWeight packed, MakeFloat8(params, codes, scale));
      samples.push_back(Named(std::move(packed), shape));
    }
  }
  return samples;
}

}  // namespace quantmill::check
