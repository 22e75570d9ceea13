// ptq: round to nearest, with the range of each group taken from its extremes, from a search for
// the least squared error, or from a quantile. ptq.smooth: smooth.cc.
#include "quantmill/sdk/plugin.hpp"

#include <iterator>

#include "ptq.h"
#include "smooth.h"

namespace quantmill::ptq {
namespace {

constexpr qm_option kOptions[] = {
    qm::kAffineBitsOption,
    qm::kAffineGroupSizeOption,
    qm::kAffineSymmetricOption,
    {"variant", "rtn", "rtn|mse|percentile",
     "Range of a group: its extremes; the one with the least squared error among 80 smaller ones; "
     "or a quantile.",
     QM_OPT_ENUM, 0},
    {"percentile", "0.999", "0.5..1.0",
     "variant percentile: the quantile of |w| (of each side when asymmetric) where the range ends.",
     QM_OPT_F64, 0},
};

qm_status ReadOptions(qm_call* call, const qm_linear_info& info, Options* out) {
  QM_TRY(qm::ReadAffineShape(call, info, &out->shape));
  const std::string_view variant = qm::OptionStr(call, "variant");
  out->search.percentile = qm::OptionF64(call, "percentile");
  if (variant == "rtn") {
    out->search.clip = qm::AffineClip::kNone;
  } else if (variant == "mse") {
    out->search.clip = qm::AffineClip::kSquaredError;
  } else if (variant == "percentile") {
    out->search.clip = qm::AffineClip::kPercentile;
  } else {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "variant \"", variant,
                    "\" is not offered; use rtn, mse or percentile");
  }
  if (!(out->search.percentile >= 0.5 && out->search.percentile <= 1.0)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "percentile ", out->search.percentile,
                    " is outside 0.5 .. 1.0");
  }
  return QM_OK;
}

struct Ptq {
  static qm_status Plan(qm_call* call, const qm_linear_info& info, qm_quant_plan* out) {
    Options options;
    QM_TRY(ReadOptions(call, info, &options));
    constexpr uint64_t kDescription = 4096;  // names and parameters of the result
    out->stats = nullptr;
    out->stat_count = 0;
    out->scratch_bytes = kDescription;
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) out->scratch_bytes += CudaScratchBytes(options.shape);
#endif
    out->scratch_bytes_shared = 0;
    // Divide, round, clamp, compare: about 10 operations a weight and pass.
    const double passes = options.search.clip == qm::AffineClip::kNone ? 2.0 : qm::kShrinkSteps;
    out->flops = 10.0 * passes * static_cast<double>(info.out_features) *
                 static_cast<double>(info.in_features);
    return qm::PlanAffineInt(call, options.shape, /*with_group_index=*/false, out);
  }

  static qm_status Run(qm_call* call, const qm_linear_info& info, const qm_tensor& weight,
                       const qm_stats*, qm_packed* out) {
    Options options;
    QM_TRY(ReadOptions(call, info, &options));
    qm::TensorView<const float> view;
    QM_TRY(qm::ViewMatrix<float>(call, weight, "the weight", call->device, info.out_features,
                                 info.in_features, &view));
    qm::AffineTensors tensors;
    QM_TRY(qm::EmitAffineInt(call, 0, options.shape, false, &tensors));
    QM_TRY(Quantize(call, options, view, tensors));
    return qm::DescribeAffineInt(call, options.shape, tensors, out);
  }

 private:
  static qm_status Quantize(qm_call* call, const Options& options,
                            qm::TensorView<const float> weight, const qm::AffineTensors& tensors) {
    if (call->device.kind == QM_CPU) return QuantizeCpu(call, options, weight, tensors);
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) return QuantizeCuda(call, options, weight, tensors);
#endif
    return qm::Fail(call, QM_FAILED_PRECONDITION,
                    "this build of ptq has no CUDA kernels; use device cpu");
  }
};

constexpr qm_quantize_linear kQuantizeLinear = qm::QuantizeLinearTable<Ptq>::Make();

const void* Ext(const qm_method*, const char* id) noexcept {
  return std::string_view(id) == QM_EXT_QUANTIZE_LINEAR ? &kQuantizeLinear : nullptr;
}

constexpr qm_method kMethod = {
    sizeof(qm_method),
    "ptq",
    "0.1.0",
    "Round to nearest: 8, 4, 3 or 2 bits, with optional clipping of the range",
    kOptions,
    std::size(kOptions),
    QM_METHOD_DETERMINISTIC,
    &Ext};
constexpr const qm_method* kMethods[] = {&kMethod, &kSmoothMethod};
constexpr qm_plugin kPlugin = {sizeof(qm_plugin), QM_ABI_MAJOR, QM_ABI_MINOR,      0, 2, kMethods,
                               "quantmill",       "Apache-2.0", "C++ " __VERSION__};

}  // namespace
}  // namespace quantmill::ptq

QM_PLUGIN_ENTRY(quantmill::ptq::kPlugin)
