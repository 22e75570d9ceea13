#include "sdk/check/packed_samples.h"

#include <algorithm>
#include <memory>
#include <random>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/formats/affine_int.h"
#include "core/tensor/dtype.h"
#include "sdk/check/quantize_call.h"

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
  specs.push_back({64, 256, {1, 64, Zero::kFloat}});
  return specs;
}

void StoreValue(const Tensor& tensor, int64_t index, float value) {
  switch (tensor.dtype()) {
    case DType::kF16:
      tensor.as<uint16_t>()[index] = F32ToF16(value);
      break;
    case DType::kBF16:
      tensor.as<uint16_t>()[index] = F32ToBF16(value);
      break;
    default:
      tensor.as<float>()[index] = value;
  }
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
      StoreValue(zero, i, static_cast<float>(random() % (codes * 8)) / 8.0f);
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
    StoreValue(scale, i, 0.01f + 0.0001f * static_cast<float>(random() % 1000));
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

// The defaults, and for each choice of an option `bits` written as a list, the defaults with it.
std::vector<OptionValues> BitsVariants(const qm_method& method) {
  std::vector<OptionValues> variants = {DefaultOptions(method)};
  for (uint64_t i = 0; i < method.option_count; ++i) {
    const qm_option& option = method.options[i];
    if (std::string_view(option.name) != "bits" || option.choices == nullptr) continue;
    const std::string_view choices = option.choices;
    if (choices.find("..") != std::string_view::npos) continue;
    for (size_t at = 0; at < choices.size();) {
      const size_t end = std::min(choices.find('|', at), choices.size());
      const std::string choice(choices.substr(at, end - at));
      if (choice != variants[0]["bits"]) {
        variants.push_back(variants[0]);
        variants.back()["bits"] = choice;
      }
      at = end + 1;
    }
  }
  return variants;
}

// What the quantizers of the plugin emit. A shape a method refuses gives no sample.
void AddOwnSamples(Subject& subject, const std::string& format_id, std::vector<PackedSample>* out) {
  for (uint32_t m = 0; m < subject.plugin->method_count; ++m) {
    Subject own = subject;
    own.method = subject.plugin->methods[m];
    if (own.Ext<qm_quantize_linear>(QM_EXT_QUANTIZE_LINEAR) == nullptr) continue;
    for (const OptionValues& options : BitsVariants(*own.method)) {
      CallSetup setup;
      setup.options = options;
      AcceptedLayer accepted;
      if (FindAcceptedLayer(own, setup, &accepted)) continue;
      const bool built_in = accepted.plan.format_id == kAffineIntId;
      if (built_in || (!format_id.empty() && accepted.plan.format_id != format_id)) continue;
      const RunAnswer run = Run(own, accepted.layer, accepted.info, accepted.plan, setup);
      if (run.violation || run.code != QM_OK) continue;
      out->push_back(
          {absl::StrCat(run.packed.format_id, " ", run.packed.format_json, " of ", own.method->id,
                        " [", run.packed.out_features, ", ", run.packed.in_features, "]"),
           run.packed});
    }
  }
}

// `packed` and `out` lie on the host.
absl::Status DequantizeWithKernel(FormatRegistry& formats, PackedWeight packed, Backend& backend,
                                  Tensor* out) {
  for (NamedTensor& named : packed.tensors) {
    QM_ASSIGN_OR_RETURN(named.tensor, backend.ToDevice(named.tensor));
  }
  QM_ASSIGN_OR_RETURN(const std::shared_ptr<PackedKernel> kernel, formats.Kernel(packed, backend));
  QM_ASSIGN_OR_RETURN(Tensor dense, backend.Allocate(out->dtype(), out->shape()));
  QM_RETURN_IF_ERROR(kernel->Dequantize(packed, &dense));
  return backend.Copy(dense, out);
}

}  // namespace

absl::StatusOr<std::vector<PackedSample>> MakePackedSamples(Subject& subject,
                                                            const std::string& format_id) {
  std::vector<PackedSample> samples;
  if (format_id.empty() || format_id == kAffineIntId) {
    uint64_t seed = subject.seed;
    for (const AffineSpec& spec : AffineSpecs()) {
      absl::StatusOr<PackedSample> sample = AffineSample(spec, seed++);
      if (!sample.ok()) return sample.status();
      samples.push_back(*std::move(sample));
    }
  }
  AddOwnSamples(subject, format_id, &samples);
  return samples;
}

absl::StatusOr<Tensor> DequantizeOnHost(Subject& subject, const PackedWeight& packed) {
  QM_ASSIGN_OR_RETURN(Tensor out,
                      Tensor::Host(DType::kF32, {packed.out_features, packed.in_features}));
  if (packed.format_id == kAffineIntId) {
    QM_RETURN_IF_ERROR(DequantizeAffineIntReference(packed, &out));
    return out;
  }
  absl::Status status = DequantizeWithKernel(*subject.formats, packed, *subject.host, &out);
  if (status.ok() || subject.backend == subject.host) {
    QM_RETURN_IF_ERROR(status);
    return out;
  }
  QM_RETURN_IF_ERROR(DequantizeWithKernel(*subject.formats, packed, *subject.backend, &out));
  return out;
}

std::string PackedDifference(const PackedWeight& a, const PackedWeight& b) {
  if (a.format_id != b.format_id || a.format_json != b.format_json) {
    return absl::StrCat(a.format_id, " ", a.format_json, " against ", b.format_id, " ",
                        b.format_json);
  }
  if (a.out_features != b.out_features || a.in_features != b.in_features) {
    return absl::StrCat("[", a.out_features, ", ", a.in_features, "] against [", b.out_features,
                        ", ", b.in_features, "]");
  }
  if (a.tensors.size() != b.tensors.size()) {
    return absl::StrCat(a.tensors.size(), " tensors against ", b.tensors.size());
  }
  for (const NamedTensor& left : a.tensors) {
    const Tensor* right = b.Find(left.name);
    if (right == nullptr) return absl::StrCat("tensor '", left.name, "' is missing");
    if (left.tensor.dtype() != right->dtype() || !(left.tensor.shape() == right->shape())) {
      return absl::StrCat("tensor '", left.name, "' has another dtype or shape");
    }
    const auto* x = left.tensor.as<uint8_t>();
    const auto* y = right->as<uint8_t>();
    for (int64_t i = 0; i < left.tensor.bytes(); ++i) {
      if (x[i] != y[i]) {
        return absl::StrCat("tensor '", left.name, "' differs from byte ", i, " of ",
                            left.tensor.bytes(), " on");
      }
    }
  }
  return "";
}

}  // namespace quantmill::check
