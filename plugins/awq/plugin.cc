// awq: activation-aware scaling, clipping and rounding, as one method or in parts.
#include <iterator>
#include <string_view>

#include "awq.h"

namespace quantmill::awq {
namespace {

constexpr qm_option kGrid = {
    "grid",
    "20",
    "2..1000",
    "Candidates of each scale; also the steps of a range's full shrink, the first half of which "
    "clipping tries.",
    QM_OPT_I64,
    0};
constexpr qm_option kDuoScaling = {
    "duo_scaling", "true",
    nullptr,       "Scales follow the weights' size, too, and not the activations' alone.",
    QM_OPT_BOOL,   0};
constexpr qm_option kLoss = {
    "loss",
    "module",
    "module|linear",
    "Where scales of q, k, v and gate, up are compared: on the outputs of the attention and the "
    "MLP, or on their own (much faster).",
    QM_OPT_ENUM,
    0};
constexpr qm_option kWindows = {
    "windows",
    "16",
    "0..1048576",
    "Calibration windows, evenly spread, that the module's loss is measured on; 0 = all.",
    QM_OPT_I64,
    0};

constexpr qm_option kOptions[] = {
    qm::kAffineBitsOption,
    qm::kAffineGroupSizeOption,
    qm::kAffineSymmetricOption,
    kGrid,
    kDuoScaling,
    {"clip", "true", nullptr, "Clip weights where that lowers the error of the output.",
     QM_OPT_BOOL, 0},
    kLoss,
    kWindows,
};
// What to prepare for where no later stage says it by its own options of these names.
constexpr qm_option kOwnBits = {"bits",
                                "0",
                                "0|2|3|4|8",
                                "Rounding to prepare for where the next packing stage has no such "
                                "option (nf4, eetq): width of a "
                                "code; 0 = refuse there.",
                                QM_OPT_I64,
                                0};
constexpr qm_option kOwnGroupSize = {
    "group_size", "128", "-1..1048576", "With bits: inputs that share a scale; -1 = all of a row.",
    QM_OPT_I64,   0};
constexpr qm_option kOwnSymmetric = {
    "symmetric", "false", nullptr, "With bits: zero point fixed in the middle.", QM_OPT_BOOL, 0};
constexpr qm_option kScaleOptions[] = {kGrid,    kDuoScaling,   kLoss,        kWindows,
                                       kOwnBits, kOwnGroupSize, kOwnSymmetric};
constexpr qm_option kClipOptions[] = {kGrid, kOwnBits, kOwnGroupSize, kOwnSymmetric};

// Rounds to nearest what the transform has prepared.
struct Round {
  static qm_status Plan(qm_call* call, const qm_linear_info& info, qm_quant_plan* out) {
    qm::AffineShape shape;
    QM_TRY(qm::ReadAffineShape(call, info, &shape));
    constexpr uint64_t kDescription = 4096;  // names and parameters of the result
    out->stats = nullptr;
    out->stat_count = 0;
    out->scratch_bytes = kDescription;
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) out->scratch_bytes += RoundScratchBytes(shape);
#endif
    out->scratch_bytes_shared = 0;
    out->flops =
        20.0 * static_cast<double>(info.out_features) * static_cast<double>(info.in_features);
    return qm::PlanAffineInt(call, shape, /*with_group_index=*/false, out);
  }

  static qm_status Run(qm_call* call, const qm_linear_info& info, const qm_tensor& weight,
                       const qm_stats*, qm_packed* out) {
    qm::AffineShape shape;
    QM_TRY(qm::ReadAffineShape(call, info, &shape));
    qm::TensorView<const float> view;
    QM_TRY(qm::ViewMatrix<float>(call, weight, "the weight", call->device, info.out_features,
                                 info.in_features, &view));
    qm::AffineTensors tensors;
    QM_TRY(qm::EmitAffineInt(call, 0, shape, false, &tensors));
    QM_TRY(RoundOn(call, shape, view, tensors));
    return qm::DescribeAffineInt(call, shape, tensors, out);
  }

 private:
  static qm_status RoundOn(qm_call* call, const qm::AffineShape& shape,
                           qm::TensorView<const float> weight, const qm::AffineTensors& tensors) {
    if (call->device.kind == QM_CPU) return RoundCpu(call, shape, weight, tensors);
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) return RoundCuda(call, shape, weight, tensors);
#endif
    return qm::Fail(call, QM_FAILED_PRECONDITION,
                    "this build of awq has no CUDA kernels; use device cpu");
  }
};

constexpr qm_quantize_linear kQuantizeLinear = qm::QuantizeLinearTable<Round>::Make();

const void* Ext(const qm_method*, const char* id) noexcept {
  const std::string_view name = id;
  if (name == QM_EXT_BLOCK_TRANSFORM) return &kTransformTable;
  return name == QM_EXT_QUANTIZE_LINEAR ? &kQuantizeLinear : nullptr;
}
const void* ScaleExt(const qm_method*, const char* id) noexcept {
  return std::string_view(id) == QM_EXT_BLOCK_TRANSFORM ? &kScaleTransformTable : nullptr;
}
const void* ClipExt(const qm_method*, const char* id) noexcept {
  return std::string_view(id) == QM_EXT_BLOCK_TRANSFORM ? &kClipTransformTable : nullptr;
}

constexpr char kVersion[] = "0.1.0";
constexpr qm_method kMethod = {
    sizeof(qm_method),
    "awq",
    kVersion,
    "Activation-aware rounding: channels rescaled and weights clipped for the least output error",
    kOptions,
    std::size(kOptions),
    QM_METHOD_DETERMINISTIC,
    &Ext};
constexpr qm_method kScaleMethod = {
    sizeof(qm_method),
    "awq.scale",
    kVersion,
    "Rescale channels for the rounding to come (AWQ); preserves the function, for any quantizer "
    "after",
    kScaleOptions,
    std::size(kScaleOptions),
    QM_METHOD_DETERMINISTIC,
    &ScaleExt};
constexpr qm_method kClipMethod = {
    sizeof(qm_method),
    "awq.clip",
    kVersion,
    "Clip weights for the rounding to come (AWQ), for any quantizer after",
    kClipOptions,
    std::size(kClipOptions),
    QM_METHOD_DETERMINISTIC,
    &ClipExt};
constexpr const qm_method* kMethods[] = {&kMethod, &kScaleMethod, &kClipMethod};
constexpr qm_plugin kPlugin = {sizeof(qm_plugin), QM_ABI_MAJOR, QM_ABI_MINOR,      0, 3, kMethods,
                               "quantmill",       "Apache-2.0", "C++ " __VERSION__};

}  // namespace
}  // namespace quantmill::awq

QM_PLUGIN_ENTRY(quantmill::awq::kPlugin)
