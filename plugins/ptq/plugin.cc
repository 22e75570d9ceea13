// ptq: round to nearest, with the range of each group taken from its extremes, from a search for
// the least squared error, or from a quantile; or 8-bit floats. ptq.smooth: smooth.cc.
#include "quantmill/sdk/plugin.hpp"

#include <iterator>

#include "ptq.h"
#include "row8.h"
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
    {"dtype", "int", "int|fp8_e4m3|fp8_e5m2",
     "Integers of `bits` bits, or 8-bit floats: with those a scale per output channel (group_size "
     "-1) or for all (group_size 0).",
     QM_OPT_ENUM, 0},
    {"activations", "none", "none|int8|fp8",
     "Also round what the linears get, row by row as it comes: int8 with bits 8, group_size -1, "
     "symmetric; fp8 with dtype fp8_e4m3.",
     QM_OPT_ENUM, 0},
};

// The tables' group_size, which is for integers.
constexpr int64_t kDefaultGroupSize = 128;

// What the options make of a linear: integers in groups, or a Row8Layout.
struct Target {
  enum class Kind { kAffine, kInt8, kFp8 };
  Kind kind = Kind::kAffine;
  Options options;        // kAffine, kInt8
  qm::Row8Layout layout;  // kInt8, kFp8
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

qm_status ReadFp8(qm_call* call, const qm_linear_info& info, std::string_view dtype,
                  std::string_view activations, Target* out) {
  QM_TRY(qm::CheckRow8Info(call, info));
  const int64_t group = qm::OptionI64(call, "group_size");
  if (group != -1 && group != 0 && group != kDefaultGroupSize) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "group_size ", group, " is not offered with dtype ",
                    dtype, "; use -1 (a scale per output channel) or 0 (one for all)");
  }
  if (qm::OptionStr(call, "variant") != "rtn") {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "variant \"", qm::OptionStr(call, "variant"),
                    "\" is not offered with dtype ", dtype, "; use rtn");
  }
  const bool e4m3 = dtype == "fp8_e4m3";
  if (activations == "int8" || (activations == "fp8" && !e4m3)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "activations \"", activations,
                    "\" is not offered with dtype ", dtype, "; use none",
                    e4m3 ? " or fp8" : ", or dtype fp8_e4m3");
  }
  out->kind = Target::Kind::kFp8;
  out->layout =
      qm::Float8Layout(info, {e4m3 ? QM_F8_E4M3 : QM_F8_E5M2, group == 0, activations == "fp8"});
  return QM_OK;
}

qm_status ReadTarget(qm_call* call, const qm_linear_info& info, Target* out) {
  const std::string_view dtype = qm::OptionStr(call, "dtype");
  const std::string_view activations = qm::OptionStr(call, "activations");
  if (activations != "none" && activations != "int8" && activations != "fp8") {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "activations \"", activations,
                    "\" is not offered; use none, int8 or fp8");
  }
  if (dtype == "fp8_e4m3" || dtype == "fp8_e5m2") {
    return ReadFp8(call, info, dtype, activations, out);
  }
  if (dtype != "int") {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "dtype \"", dtype,
                    "\" is not offered; use int, fp8_e4m3 or fp8_e5m2");
  }
  QM_TRY(ReadOptions(call, info, &out->options));
  if (activations == "none") return QM_OK;
  const qm::AffineShape& shape = out->options.shape;
  if (activations == "fp8") {
    return qm::Fail(call, QM_INVALID_ARGUMENT,
                    "activations \"fp8\" is not offered with dtype int; use dtype fp8_e4m3");
  }
  if (shape.rule.bits != 8 || shape.group_size != -1 || !shape.rule.symmetric) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "activations \"int8\" needs bits 8, group_size -1 ",
                    "and symmetric true; got bits ", shape.rule.bits, ", group_size ",
                    shape.group_size, ", symmetric ", shape.rule.symmetric ? "true" : "false");
  }
  out->kind = Target::Kind::kInt8;
  out->layout = qm::Int8RowLayout(info, /*int8_activations=*/true);
  return QM_OK;
}

struct Ptq {
  static qm_status Plan(qm_call* call, const qm_linear_info& info, qm_quant_plan* out) {
    Target target;
    QM_TRY(ReadTarget(call, info, &target));
    const Options& options = target.options;
    constexpr uint64_t kDescription = 4096;  // names and parameters of the result
    out->stats = nullptr;
    out->stat_count = 0;
    out->scratch_bytes = kDescription + ScratchBytes(call, target);
    out->scratch_bytes_shared = 0;
    // Divide, round, clamp, compare: about 10 operations a weight and pass.
    const double passes = options.search.clip == qm::AffineClip::kNone ? 2.0 : qm::kShrinkSteps;
    out->flops = 10.0 * passes * static_cast<double>(info.out_features) *
                 static_cast<double>(info.in_features);
    if (target.kind != Target::Kind::kAffine) return qm::PlanRow8(call, target.layout, out);
    return qm::PlanAffineInt(call, options.shape, /*with_group_index=*/false, out);
  }

  static qm_status Run(qm_call* call, const qm_linear_info& info, const qm_tensor& weight,
                       const qm_stats*, qm_packed* out) {
    Target target;
    QM_TRY(ReadTarget(call, info, &target));
    qm::TensorView<const float> view;
    QM_TRY(qm::ViewMatrix<float>(call, weight, "the weight", call->device, info.out_features,
                                 info.in_features, &view));
    if (target.kind != Target::Kind::kAffine) return RunRow8(call, target, view, out);
    const Options& options = target.options;
    qm::AffineTensors tensors;
    QM_TRY(qm::EmitAffineInt(call, 0, options.shape, false, &tensors));
    QM_TRY(Quantize(call, options, view, tensors));
    return qm::DescribeAffineInt(call, options.shape, tensors, out);
  }

 private:
  static uint64_t ScratchBytes(qm_call* call, const Target& target) {
    uint64_t bytes = 0;
    if (target.kind == Target::Kind::kInt8) {
      bytes += 4 * static_cast<uint64_t>(target.layout.out_features *
                                         qm::AffineWordsPerRow(target.layout.in_features, 8));
    }
#if defined(QM_HAVE_CUDA)
    if (call->device.kind != QM_CUDA) return bytes;
    bytes += target.kind == Target::Kind::kFp8 ? Fp8CudaScratchBytes(target.layout)
                                               : CudaScratchBytes(target.options.shape);
#else
    (void)call;
#endif
    return bytes;
  }

  static qm_status RunRow8(qm_call* call, const Target& target, qm::TensorView<const float> weight,
                           qm_packed* out) {
    qm::Row8Tensors tensors;
    QM_TRY(qm::EmitRow8(call, target.layout, &tensors));
    QM_TRY(target.kind == Target::Kind::kFp8
               ? QuantizeFp8(call, target.layout, weight, tensors)
               : QuantizeInt8(call, target.options, target.layout, weight, tensors));
    return qm::DescribeRow8(call, target.layout, tensors, out);
  }

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
    "Round to nearest: 8, 4, 3 or 2 bits or 8-bit floats, activations too if asked",
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
