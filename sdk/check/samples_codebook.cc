// Weights of qm.fmt.codebook-absmax/1 drawn at random: both codebooks, block sizes, double
// quantization, shapes whose rows end inside a block or a byte.
#include <cmath>
#include <random>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/formats/codebook_absmax.h"
#include "sdk/check/packed_samples.h"

namespace quantmill::check {
namespace {

struct CodebookSpec {
  int64_t out = 0, in = 0;
  CodebookAbsmaxParams params;
};

std::vector<CodebookSpec> CodebookSpecs() {
  using Type = CodebookAbsmaxParams::Type;
  std::vector<CodebookSpec> specs;
  for (const Type type : {Type::kNf4, Type::kFp4}) {
    for (const int64_t nested : {0, 256}) {
      specs.push_back({64, 256, {64, DType::kBF16, nested, type}});
      specs.push_back({65, 96, {64, DType::kF16, nested, type}});  // blocks cross rows
      specs.push_back({33, 37, {32, DType::kF32, nested, type}});  // rows end inside a byte
      specs.push_back({1, 1, {64, DType::kBF16, nested, type}});
      specs.push_back({24, 1024, {4096, DType::kBF16, nested, type}});
    }
  }
  specs.push_back({64, 256, {32, DType::kBF16, 7, Type::kNf4}});
  return specs;
}

absl::StatusOr<Tensor> RandomBytes(int64_t count, std::mt19937_64& random) {
  QM_ASSIGN_OR_RETURN(Tensor bytes, Tensor::Host(DType::kU8, {count}));
  for (int64_t i = 0; i < count; ++i) bytes.as<uint8_t>()[i] = static_cast<uint8_t>(random());
  return bytes;
}

// Uniform in [low, high).
absl::StatusOr<Tensor> RandomFloats(int64_t count, float low, float high, std::mt19937_64& random) {
  QM_ASSIGN_OR_RETURN(Tensor floats, Tensor::Host(DType::kF32, {count}));
  for (int64_t i = 0; i < count; ++i) {
    floats.as<float>()[i] = low + (high - low) * static_cast<float>(random() % 4096) / 4096.0f;
  }
  return floats;
}

absl::StatusOr<PackedSample> CodebookSample(const CodebookSpec& spec, uint64_t seed) {
  std::mt19937_64 random(seed);
  const CodebookAbsmaxParams& params = spec.params;
  const int64_t n = spec.out * spec.in, blocks = params.Blocks(n);
  PackedWeight weight;
  weight.format_id = std::string(kCodebookAbsmaxId);
  weight.format_json = CodebookAbsmaxJson(params);
  weight.out_features = spec.out;
  weight.in_features = spec.in;
  const auto add = [&](const char* name, absl::StatusOr<Tensor> tensor) {
    if (tensor.ok()) weight.tensors.push_back({name, *std::move(tensor)});
    return tensor.status();
  };
  QM_RETURN_IF_ERROR(add("codes", RandomBytes((n + 1) / 2, random)));
  QM_RETURN_IF_ERROR(add("absmax", params.nested_block_size > 0
                                       ? RandomBytes(blocks, random)
                                       : RandomFloats(blocks, 0.01f, 0.2f, random)));
  QM_RETURN_IF_ERROR(add("codebook", RandomFloats(16, -1.0f, 1.0f, random)));
  if (params.nested_block_size > 0) {
    QM_RETURN_IF_ERROR(
        add("nested_absmax", RandomFloats(params.NestedBlocks(n), 0.01f, 0.1f, random)));
    QM_RETURN_IF_ERROR(add("nested_codebook", RandomFloats(256, -1.0f, 1.0f, random)));
    QM_RETURN_IF_ERROR(add("absmax_offset", RandomFloats(1, 0.1f, 0.2f, random)));
  }
  return PackedSample{absl::StrCat(weight.format_json, " [", spec.out, ", ", spec.in, "]"),
                      std::move(weight)};
}

}  // namespace

absl::StatusOr<std::vector<PackedSample>> CodebookSamples(uint64_t seed) {
  std::vector<PackedSample> samples;
  for (const CodebookSpec& spec : CodebookSpecs()) {
    QM_ASSIGN_OR_RETURN(PackedSample sample, CodebookSample(spec, seed++));
    samples.push_back(std::move(sample));
  }
  return samples;
}

}  // namespace quantmill::check
