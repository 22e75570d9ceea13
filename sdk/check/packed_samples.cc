#include "sdk/check/packed_samples.h"

#include <algorithm>
#include <iterator>
#include <memory>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/formats/additive_codebook.h"
#include "core/formats/affine_int.h"
#include "core/formats/codebook_absmax.h"
#include "core/formats/float8.h"
#include "core/formats/int8_row.h"
#include "core/formats/reference.h"
#include "core/tensor/dtype.h"
#include "sdk/check/quantize_call.h"

namespace quantmill::check {
namespace {

// Formats with samples of their own; a file each.
struct SampleMaker {
  std::string_view format_id;
  absl::StatusOr<std::vector<PackedSample>> (*make)(uint64_t seed);
};
constexpr SampleMaker kMakers[] = {
    {kAffineIntId, &AffineSamples},
    {kCodebookAbsmaxId, &CodebookSamples},
    {kInt8RowId, &Int8RowSamples},
    {kFloat8Id, &Float8Samples},
    {kAdditiveCodebookId, &AdditiveCodebookSamples},
};

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
      const bool built_in = FindReferenceFormat(accepted.plan.format_id) != nullptr;
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
  for (const SampleMaker& maker : kMakers) {
    if (!format_id.empty() && format_id != maker.format_id) continue;
    QM_ASSIGN_OR_RETURN(std::vector<PackedSample> made, maker.make(subject.seed));
    samples.insert(samples.end(), std::make_move_iterator(made.begin()),
                   std::make_move_iterator(made.end()));
  }
  AddOwnSamples(subject, format_id, &samples);
  return samples;
}

absl::StatusOr<Tensor> DequantizeOnHost(Subject& subject, const PackedWeight& packed) {
  QM_ASSIGN_OR_RETURN(Tensor out,
                      Tensor::Host(DType::kF32, {packed.out_features, packed.in_features}));
  if (FindReferenceFormat(packed.format_id) != nullptr) {
    QM_RETURN_IF_ERROR(DequantizeWithReference(packed, &out));
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
