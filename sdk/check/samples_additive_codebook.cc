// Weights of qm.fmt.additive-codebook/1 drawn at random: the usual schemes, and shapes and widths
// that fit no fast kernel.
#include <random>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/formats/additive_codebook.h"
#include "core/tensor/dtype.h"
#include "sdk/check/packed_samples.h"

namespace quantmill::check {
namespace {

struct Spec {
  int64_t out = 0, in = 0;
  AdditiveCodebookParams params;
  DType dtype = DType::kF16;  // of codebooks and scales
};

absl::StatusOr<PackedSample> Sample(const Spec& spec, uint64_t seed) {
  const AdditiveCodebookParams& p = spec.params;
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  PackedSample sample;
  PackedWeight& packed = sample.packed;
  QM_ASSIGN_OR_RETURN(
      Tensor codes, Tensor::Host(p.code_dtype(), {spec.out, spec.in / p.group_size, p.codebooks}));
  const int64_t half = p.codebook_length() / 2;
  for (int64_t i = 0; i < codes.elements(); ++i) {
    const int64_t code = static_cast<int64_t>(random() % (2 * static_cast<uint64_t>(half))) - half;
    if (codes.dtype() == DType::kI8) codes.as<int8_t>()[i] = static_cast<int8_t>(code);
    if (codes.dtype() == DType::kI16) codes.as<int16_t>()[i] = static_cast<int16_t>(code);
  }
  QM_ASSIGN_OR_RETURN(Tensor codebooks,
                      Tensor::Host(spec.dtype, {p.codebooks, p.codebook_length(), p.group_size}));
  for (int64_t i = 0; i < codebooks.elements(); ++i) StoreFloat(codebooks, i, normal(random));
  QM_ASSIGN_OR_RETURN(Tensor scales, Tensor::Host(spec.dtype, {spec.out}));
  for (int64_t i = 0; i < scales.elements(); ++i) {
    StoreFloat(scales, i, 0.01f + 0.0001f * static_cast<float>(random() % 1000));
  }
  packed = {std::string(kAdditiveCodebookId),
            AdditiveCodebookJson(p),
            {{"codes", codes}, {"codebooks", codebooks}, {"scales", scales}},
            spec.out,
            spec.in};
  sample.name = absl::StrCat(packed.format_json, " [", spec.out, ", ", spec.in, "], values ",
                             std::string(DTypeName(spec.dtype)));
  return sample;
}

}  // namespace

absl::StatusOr<std::vector<PackedSample>> AdditiveCodebookSamples(uint64_t seed) {
  const Spec specs[] = {
      {64, 256, {2, 8, 8}},                // 2x8 as published
      {24, 512, {1, 8, 8}},                // 1x8
      {40, 256, {1, 8, 16}},               // 1x16
      {16, 256, {1, 16, 16}},              // 1x16, groups of 16
      {16, 256, {8, 32, 8}},               // 8x8, groups of 32
      {33, 100, {3, 5, 4}, DType::kBF16},  // odd everything
      {1, 8, {2, 8, 8}, DType::kF32},      // one group
      {7, 3, {1, 1, 1}, DType::kF32},      // scalars, one bit
      {20, 264, {2, 8, 8}},                // 33 groups a row
  };
  std::vector<PackedSample> samples;
  for (const Spec& spec : specs) {
    QM_ASSIGN_OR_RETURN(PackedSample sample, Sample(spec, seed++));
    samples.push_back(std::move(sample));
  }
  return samples;
}

}  // namespace quantmill::check
