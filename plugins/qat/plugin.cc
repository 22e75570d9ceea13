// qat: quantization-aware training. Weights, steps and zero points of a linear are trained through
// its rounding; what comes out is affine-int.
#include "quantmill/sdk/plugin.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <iterator>

#include "qat.h"
#include "quantmill/sdk/tables.hpp"

namespace quantmill::qat {
namespace {

constexpr qm_option kOptions[] = {
    qm::kAffineBitsOption,
    qm::kAffineGroupSizeOption,
    qm::kAffineSymmetricOption,
    {"init", "mse", "mse|gptq|awq|hqq",
     "Where training starts: the ranges of least squared error, or the result of such a stage "
     "before this one.",
     QM_OPT_ENUM, 0},
    {"phases", "blocks,end_to_end", "blocks,end_to_end|end_to_end|blocks",
     "Train block by block, all at once, or the one after the other.", QM_OPT_ENUM, 0},
    {"train_weights", "true", nullptr,
     "false: end to end only scales are trained, neither weights nor zero points.", QM_OPT_BOOL, 0},
    {"scale_lr", "3", "0..1000000",
     "Learning rate of scales, as a multiple of train.lr; a scale is trained as a factor on what "
     "it "
     "was first. 0 = not trained.",
     QM_OPT_F64, 0},
    {"zero_lr", "3", "0..1000000",
     "Learning rate of zero points, in codes, as a multiple of train.lr. 0 = not trained.",
     QM_OPT_F64, 0},
};

constexpr char kFactor[] = "scale_factor";
constexpr char kZero[] = "zero";
constexpr char kScaleInit[] = "scale_init";

struct Settings {
  qm::AffineShape shape;
  bool from_base = false;   // init is not mse
  bool exact_base = false;  // the base has whole zero points: its codes can be kept
  bool trained = true;      // the phase is one of `phases`
  bool train_weights = true;
  bool train_zeros = true;
  double scale_lr = 1.0;
  double zero_lr = 1.0;
};

// ---- options -----------------------------------------------------------------------------------
qm_status ReadPhase(qm_call* call, qm_reparam_phase phase, Settings* out) {
  const std::string_view phases = qm::OptionStr(call, "phases");
  const bool both = phases == "blocks,end_to_end";
  if (!both && phases != "blocks" && phases != "end_to_end") {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "phases \"", phases,
                    "\" is not offered; use [blocks, end_to_end], [end_to_end] or [blocks]");
  }
  if (phase != QM_PHASE_BLOCK && phase != QM_PHASE_END_TO_END) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "phase code ", phase,
                    " is unknown to qat; it knows QM_PHASE_BLOCK and QM_PHASE_END_TO_END");
  }
  out->trained = both || phases == (phase == QM_PHASE_BLOCK ? "blocks" : "end_to_end");
  const bool all = phase == QM_PHASE_BLOCK || qm::OptionBool(call, "train_weights");
  out->train_weights = all;
  out->scale_lr = qm::OptionF64(call, "scale_lr");
  out->zero_lr = qm::OptionF64(call, "zero_lr");
  for (const double lr : {out->scale_lr, out->zero_lr}) {
    if (lr >= 0.0 && std::isfinite(lr)) continue;
    return qm::Fail(call, QM_INVALID_ARGUMENT, "scale_lr and zero_lr must be 0 or more; got ", lr);
  }
  out->train_zeros = all && out->zero_lr > 0.0;
  return QM_OK;
}

// The base has the codes of `shape`, with zero points stored as `zero` says.
bool HasFormat(const char* json, const qm::AffineShape& shape, const char* zero) {
  const auto equal = [&](int64_t group) {
    return json == qm::AffineIntJson(shape.rule.bits, group, zero);
  };
  // A whole row has two spellings.
  return equal(shape.group_size) ||
         (shape.group_width() == shape.in_features && (equal(-1) || equal(shape.in_features)));
}

qm_status CheckBase(qm_call* call, std::string_view init, const qm_packed* base, Settings* out) {
  if (base == nullptr) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "init: ", init, " starts from a packed weight; ",
                    "put ", init == "gptq" ? "a " : "an ", init,
                    " stage on these layers before this one, or use init: mse");
  }
  const qm::AffineShape& shape = out->shape;
  if (base->format_id == nullptr || std::strcmp(base->format_id, qm::kAffineIntFormat) != 0) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "init: ", init, " starts from integers in groups",
                    " (", qm::kAffineIntFormat, "), but these layers hold ",
                    base->format_id == nullptr ? "no named format" : base->format_id,
                    "; put a gptq, awq or hqq stage there");
  }
  const char* json = base->format_json == nullptr ? "" : base->format_json;
  out->exact_base = HasFormat(json, shape, shape.rule.symmetric ? "none" : "int");
  if (out->exact_base) return QM_OK;
  if (!shape.rule.symmetric && HasFormat(json, shape, "float")) {
    if (init == "hqq") return QM_OK;
    return qm::Fail(call, QM_FAILED_PRECONDITION,
                    "these layers have zero points that are not whole, as hqq makes them; use "
                    "init: hqq");
  }
  return qm::Fail(
      call, QM_FAILED_PRECONDITION, "these layers are packed as ", json,
      " but the options ask for ",
      qm::AffineIntJson(shape.rule.bits, shape.group_size, shape.rule.symmetric ? "none" : "int"),
      "; give both stages the same bits, group_size and symmetric (hqq: axis 1, no quantize_scale ",
      "or quantize_zero)");
}

qm_status ReadSettings(qm_call* call, const qm_reparam_info& info, Settings* out) {
  if (info.linear == nullptr) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "qat works on a linear, and got none");
  }
  QM_TRY(qm::ReadAffineShape(call, *info.linear, &out->shape));
  QM_TRY(ReadPhase(call, info.phase, out));
  const std::string_view init = qm::OptionStr(call, "init");
  if (init == "gptq" || init == "awq" || init == "hqq") {
    out->from_base = true;
    return CheckBase(call, init, info.base, out);
  }
  if (init != "mse") {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "init \"", init,
                    "\" is not offered; use mse, gptq, awq or hqq");
  }
  if (info.base == nullptr) return QM_OK;
  return qm::Fail(call, QM_FAILED_PRECONDITION,
                  "init: mse starts from dense weights, but a stage before this one has packed "
                  "these layers; use init: gptq, awq or hqq as that stage is, or leave it out");
}

// ---- plan --------------------------------------------------------------------------------------
qm_status PlanParams(qm_call* call, const Settings& settings, qm_reparam_plan* out) {
  const qm::AffineShape& shape = settings.shape;
  qm_param* params = nullptr;
  QM_TRY(qm::Scratch(call, {QM_CPU, 0}, 3, "the plan", &params));
  uint64_t count = 0;
  const auto add = [&](const char* name, double lr, bool trained) {
    params[count++] = {name, {shape.out_features, shape.groups(), 1, 1},
                       lr,   QM_F32,
                       2,    (trained ? QM_PARAM_TRAINABLE : 0) | QM_PARAM_NO_DECAY};
  };
  add(kFactor, settings.scale_lr, settings.scale_lr > 0.0);
  if (!shape.rule.symmetric) add(kZero, settings.zero_lr, settings.train_zeros);
  add(kScaleInit, 0.0, false);
  out->params = params;
  out->param_count = count;
  return QM_OK;
}

qm_status PlanResult(qm_call* call, const Settings& settings, qm_reparam_plan* out) {
  constexpr size_t kMinor1 = offsetof(qm_reparam_plan, flags) + sizeof out->flags;
  if (out->struct_size < kMinor1) {
    return qm::Fail(call, QM_FAILED_PRECONDITION,
                    "qat needs a program that trains weights (plugin ABI 1.1); update quantmill");
  }
  qm_quant_plan plan = {};
  plan.struct_size = sizeof plan;
  QM_TRY(qm::PlanAffineInt(call, settings.shape, /*with_group_index=*/false, &plan));
  out->weight_lr_scale = settings.train_weights ? 1.0 : 0.0;
  out->format_id = plan.format_id;
  out->format_json = plan.format_json;
  out->bits_per_weight = plan.bits_per_weight;
  out->flags = 0;
  return QM_OK;
}

// ---- arguments of the calls
// ---------------------------------------------------------------------- A contiguous f32 matrix on
// the device of the call.
qm_status ViewDense(qm_call* call, const qm_tensor& tensor, const char* what, int64_t rows,
                    int64_t cols, const float** out) {
  qm::TensorView<const float> view;
  QM_TRY(qm::ViewMatrix<float>(call, tensor, what, call->device, rows, cols, &view));
  if (rows > 1 && view.stride(0) != cols) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, what, " must be contiguous; pass a copy");
  }
  *out = view.data();
  return QM_OK;
}

// The tensor `name` of [out, groups]; *out is null where it has no data.
qm_status FindParam(qm_call* call, const qm::AffineShape& shape, const qm_named_tensor* params,
                    uint64_t count, const char* name, const float** out) {
  *out = nullptr;
  for (uint64_t i = 0; i < count; ++i) {
    if (std::strcmp(params[i].name, name) != 0) continue;
    if (params[i].tensor.data == nullptr) return QM_OK;
    return ViewDense(call, params[i].tensor, name, shape.out_features, shape.groups(), out);
  }
  return QM_OK;
}

qm_status FindParams(qm_call* call, const qm::AffineShape& shape, const qm_named_tensor* params,
                     uint64_t count, Parameters* out) {
  QM_TRY(FindParam(call, shape, params, count, kFactor, &out->factor));
  QM_TRY(FindParam(call, shape, params, count, kScaleInit, &out->scale_init));
  if (!shape.rule.symmetric) QM_TRY(FindParam(call, shape, params, count, kZero, &out->zero));
  if (out->factor != nullptr && out->scale_init != nullptr &&
      (shape.rule.symmetric || out->zero != nullptr)) {
    return QM_OK;
  }
  return qm::Fail(call, QM_INVALID_ARGUMENT, "qat needs the parameters ", kFactor, ", ", kScaleInit,
                  shape.rule.symmetric ? "" : " and zero", " of its plan, with data");
}

// The device of the call runs CPU code or, in a build with it, CUDA.
qm_status CheckDevice(qm_call* call) {
#if defined(QM_HAVE_CUDA)
  if (call->device.kind == QM_CUDA) return QM_OK;
#endif
  if (call->device.kind == QM_CPU) return QM_OK;
  return qm::Fail(call, QM_FAILED_PRECONDITION,
                  "this build of qat has no CUDA kernels; use device cpu");
}

#if !defined(QM_HAVE_CUDA)
// Never called: CheckDevice has refused.
#define QM_QAT_DISPATCH(name, ...) name##Cpu(__VA_ARGS__)
#else
#define QM_QAT_DISPATCH(name, ...) \
  (call->device.kind == QM_CPU ? name##Cpu(__VA_ARGS__) : name##Cuda(__VA_ARGS__))
#endif

// ---- the table
// -----------------------------------------------------------------------------------
struct Qat {
  static qm_status Plan(qm_call* call, const qm_reparam_info& info, qm_reparam_plan* out) {
    Settings settings;
    QM_TRY(ReadSettings(call, info, &settings));
    if (!settings.trained) {
      return qm::Fail(call, QM_UNIMPLEMENTED, "phases does not name this phase");
    }
    constexpr uint64_t kScratch = 8192;  // names, parameters, flags of checks
    QM_TRY(PlanParams(call, settings, out));
    out->saved_bytes_per_row = 0;  // vjp rounds again: cheaper than keeping codes
    out->saved_bytes_fixed = 0;
    out->scratch_bytes = kScratch;
    out->stats = nullptr;
    out->stat_count = 0;
    out->kind = QM_REPARAM_WEIGHT;
    return PlanResult(call, settings, out);
  }

  static qm_status Init(qm_call* call, const qm_reparam_info& info, const qm_tensor* weight,
                        const qm_stats*, qm_named_tensor* params, uint64_t param_count) {
    Settings settings;
    QM_TRY(ReadSettings(call, info, &settings));
    QM_TRY(CheckDevice(call));
    const qm::AffineShape& shape = settings.shape;
    if (weight == nullptr) {
      return qm::Fail(call, QM_FAILED_PRECONDITION,
                      "qat needs the weight as it was before it was packed; it got none");
    }
    qm::TensorView<const float> view;
    QM_TRY(qm::ViewMatrix<float>(call, *weight, "the weight", call->device, shape.out_features,
                                 shape.in_features, &view));
    Parameters found;
    QM_TRY(FindParams(call, shape, params, param_count, &found));
    const FreshParameters fresh = {const_cast<float*>(found.factor),
                                   const_cast<float*>(found.scale_init),
                                   const_cast<float*>(found.zero)};
    if (!settings.from_base) return QM_QAT_DISPATCH(InitFromWeight, call, shape, view, fresh);
    return InitFromBase(call, settings, *info.base, view, fresh);
  }

  static qm_status Forward(qm_call* call, const qm_reparam_info& info, const qm_tensor& in,
                           const qm_named_tensor* params, uint64_t param_count, void*,
                           qm_tensor* out) {
    qm::AffineShape shape;
    QM_TRY(qm::ReadAffineShape(call, *info.linear, &shape));
    QM_TRY(CheckDevice(call));
    const float* weight = nullptr;
    QM_TRY(ViewDense(call, in, "the weight", shape.out_features, shape.in_features, &weight));
    Parameters found;
    QM_TRY(FindParams(call, shape, params, param_count, &found));
    if (out->dtype != QM_F32 && out->dtype != QM_F16 && out->dtype != QM_BF16) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "the result has dtype code ", out->dtype,
                      "; qat writes F32, F16 or BF16");
    }
    if (out->rank != 2 || out->shape[0] != shape.out_features ||
        out->shape[1] != shape.in_features || out->data == nullptr) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "the result must have shape [", shape.out_features,
                      ", ", shape.in_features, "]");
    }
    return QM_QAT_DISPATCH(Forward, call, shape, weight, found, out->dtype, out->data);
  }

  static qm_status Vjp(qm_call* call, const qm_reparam_info& info, const qm_tensor& in,
                       const qm_named_tensor* params, uint64_t param_count, const void*,
                       const qm_tensor& d_out, qm_tensor* d_in, qm_named_tensor* d_params) {
    qm::AffineShape shape;
    QM_TRY(qm::ReadAffineShape(call, *info.linear, &shape));
    QM_TRY(CheckDevice(call));
    const int64_t rows = shape.out_features, cols = shape.in_features;
    const float *weight = nullptr, *above = nullptr, *d_weight = nullptr;
    QM_TRY(ViewDense(call, in, "the weight", rows, cols, &weight));
    QM_TRY(ViewDense(call, d_out, "the gradient of the result", rows, cols, &above));
    if (d_in != nullptr && d_in->data != nullptr) {
      QM_TRY(ViewDense(call, *d_in, "the gradient of the weight", rows, cols, &d_weight));
    }
    Parameters found, wanted;
    QM_TRY(FindParams(call, shape, params, param_count, &found));
    QM_TRY(FindParam(call, shape, d_params, param_count, kFactor, &wanted.factor));
    if (!shape.rule.symmetric) {
      QM_TRY(FindParam(call, shape, d_params, param_count, kZero, &wanted.zero));
    }
    const Gradients gradients = {const_cast<float*>(d_weight), const_cast<float*>(wanted.factor),
                                 const_cast<float*>(wanted.zero)};
    return QM_QAT_DISPATCH(Vjp, call, shape, weight, found, above, gradients);
  }

  static qm_status Finalize(qm_call* call, const qm_reparam_info& info, const qm_tensor* weight,
                            const qm_named_tensor* params, uint64_t param_count, qm_packed* out) {
    qm::AffineShape shape;
    QM_TRY(qm::ReadAffineShape(call, *info.linear, &shape));
    QM_TRY(CheckDevice(call));
    if (weight == nullptr) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "qat packs the trained weight; it got none");
    }
    qm::TensorView<const float> view;
    QM_TRY(qm::ViewMatrix<float>(call, *weight, "the trained weight", call->device,
                                 shape.out_features, shape.in_features, &view));
    Parameters found;
    QM_TRY(FindParams(call, shape, params, param_count, &found));
    qm::AffineTensors tensors;
    QM_TRY(qm::EmitAffineInt(call, 0, shape, false, &tensors));
    QM_TRY(QM_QAT_DISPATCH(Finalize, call, shape, view, found, tensors));
    return qm::DescribeAffineInt(call, shape, tensors, out);
  }

 private:
  static qm_status InitFromBase(qm_call* call, const Settings& settings, const qm_packed& packed,
                                qm::TensorView<const float> weight, const FreshParameters& fresh) {
    const qm::AffineShape& shape = settings.shape;
    Base base;
    QM_TRY(ReadBase(call, shape, packed, &base));
    qm_tensor start = {};
    // Zero points that had to be rounded fit other codes: the weight is rounded anew.
    if (settings.exact_base) {
      const int64_t dims[2] = {shape.out_features, shape.in_features};
      QM_TRY(call->emit(call, 0, "weight", call->device, QM_F32, 2, dims, &start));
    }
    return QM_QAT_DISPATCH(InitFromBase, call, shape, weight, base, fresh,
                           static_cast<float*>(start.data));
  }
};

constexpr qm_reparametrize kTable = qm::ReparametrizeTable<Qat>::Make();

const void* Ext(const qm_method*, const char* id) noexcept {
  return std::string_view(id) == QM_EXT_REPARAMETRIZE ? &kTable : nullptr;
}

constexpr qm_method kMethod = {
    sizeof(qm_method),
    "qat",
    "0.1.0",
    "Quantization-aware training: weights, scales and zero points trained through the rounding",
    kOptions,
    std::size(kOptions),
    QM_METHOD_DETERMINISTIC | QM_METHOD_TRAINS_TO_PACKED,
    &Ext};
constexpr const qm_method* kMethods[] = {&kMethod};
constexpr qm_plugin kPlugin = {sizeof(qm_plugin), QM_ABI_MAJOR, QM_ABI_MINOR,      0, 1, kMethods,
                               "quantmill",       "Apache-2.0", "C++ " __VERSION__};

}  // namespace
}  // namespace quantmill::qat

QM_PLUGIN_ENTRY(quantmill::qat::kPlugin)
