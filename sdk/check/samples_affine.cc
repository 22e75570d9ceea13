// Weights of qm.fmt.affine-int/1 drawn at random: all widths, kinds of zero point and group sizes,
// odd shapes, scattered groups.
#include <random>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/formats/affine_int.h"
#include "core/tensor/dtype.h"
#include "sdk/check/packed_samples.h"

namespace quantmill::check {
namespace {

struct AffineSpec {
  int64_t out = 0, in = 0;
  AffineIntParams params;
  DType scale_dtype = DType::kF16;
  bool scattered = false;  // with a group_index
};

std::vector<AffineSpec> AffineSpecs() {
  using Zero = AffineIntParams::Zero;
  std::vector<AffineSpec> specs;
  for (const int bits : {2, 3, 4, 8}) {
    specs.push_back({64, 256, {bits, 128, Zero::kInt}});
    specs.push_back({64, 256, {bits, -1, Zero::kNone}});
    specs.push_back({64, 256, {bits, 64, Zero::kFloat}});
    specs.push_back({64, 256, {bits, 64, Zero::kInt}, DType::kBF16, /*scattered=*/true});
    specs.push_back({33, 100, {bits, 5, Zero::kInt}, DType::kF32});
    specs.push_back({1, 1, {bits, 1, Zero::kInt}, DType::kF32});
    specs.push_back({64, 96, {bits, 32, Zero::kFloat, /*axis=*/0}});
  }
  for (const int bits : {4, 8}) specs.push_back({33, 96, {bits, 32, Zero::kNone}});
  specs.push_back({33, 96, {4, 32, Zero::kInt}});
  specs.push_back({64, 256, {1, 64, Zero::kFloat}});
  return specs;
}

absl::StatusOr<Tensor> RandomZeros(const AffineSpec& spec, std::mt19937_64& random) {
  const AffineIntParams& params = spec.params;
  const Shape shape = params.GroupShape(spec.out, spec.in);
  const int64_t count = shape.elements();
  const uint64_t codes = uint64_t{1} << params.bits;
  Tensor zero;
  if (params.zero == AffineIntParams::Zero::kInt) {
    QM_ASSIGN_OR_RETURN(zero, Tensor::Host(DType::kU8, shape));
    // From 1: gptq files of the first version cannot hold a zero point of 0.
    for (int64_t i = 0; i < count; ++i) {
      zero.as<uint8_t>()[i] = static_cast<uint8_t>(1 + random() % (codes - 1));
    }
  } else if (params.zero == AffineIntParams::Zero::kFloat) {
    QM_ASSIGN_OR_RETURN(zero, Tensor::Host(DType::kF16, shape));
    for (int64_t i = 0; i < count; ++i) {
      StoreFloat(zero, i, static_cast<float>(random() % (codes * 8)) / 8.0f);
    }
  }
  return zero;
}

absl::StatusOr<PackedSample> AffineSample(const AffineSpec& spec, uint64_t seed) {
  std::mt19937_64 random(seed);
  QM_ASSIGN_OR_RETURN(const Tensor codes, Tensor::Host(DType::kU8, {spec.out, spec.in}));
  for (int64_t i = 0; i < codes.elements(); ++i) {
    codes.as<uint8_t>()[i] = static_cast<uint8_t>(random() % (uint64_t{1} << spec.params.bits));
  }
  QM_ASSIGN_OR_RETURN(const Tensor scale,
                      Tensor::Host(spec.scale_dtype, spec.params.GroupShape(spec.out, spec.in)));
  for (int64_t i = 0; i < scale.elements(); ++i) {
    StoreFloat(scale, i, 0.01f + 0.0001f * static_cast<float>(random() % 1000));
  }
  QM_ASSIGN_OR_RETURN(const Tensor zero, RandomZeros(spec, random));
  Tensor group_index;
  if (spec.scattered) {
    const int64_t groups = spec.params.Groups(spec.in);
    QM_ASSIGN_OR_RETURN(group_index, Tensor::Host(DType::kI32, {spec.in}));
    // 7 is coprime to the width: every group keeps its number of channels.
    for (int64_t i = 0; i < spec.in; ++i) {
      group_index.as<int32_t>()[i] = static_cast<int32_t>(i * 7 % spec.in / (spec.in / groups));
    }
  }
  PackedSample sample;
  QM_ASSIGN_OR_RETURN(sample.packed, MakeAffineInt(spec.params, codes, scale, zero, group_index));
  sample.name = absl::StrCat(sample.packed.format_json, " [", spec.out, ", ", spec.in, "], scales ",
                             std::string(DTypeName(spec.scale_dtype)),
                             spec.scattered ? ", scattered groups" : "");
  return sample;
}

}  // namespace

absl::StatusOr<std::vector<PackedSample>> AffineSamples(uint64_t seed) {
  std::vector<PackedSample> samples;
  for (const AffineSpec& spec : AffineSpecs()) {
    QM_ASSIGN_OR_RETURN(PackedSample sample, AffineSample(spec, seed++));
    samples.push_back(std::move(sample));
  }
  return samples;
}

}  // namespace quantmill::check
