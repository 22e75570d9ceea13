// hqq: half-quadratic quantization. Scales from the range of each group, zero points from a robust
// fit of the rounding error; no calibration data.
#include "quantmill/sdk/plugin.hpp"

#include <cmath>
#include <iterator>

#include "hqq.h"

namespace quantmill::hqq {
namespace {

constexpr qm_option kOptions[] = {
    {"bits", "4", "8|4|3|2|1", "Width of a code in bits.", QM_OPT_I64, 0},
    {"group_size", "64", "-1..1048576",
     "Weights that share a scale; must divide in_features (axis 0: out_features); -1 = a whole row "
     "(axis 0: column).",
     QM_OPT_I64, 0},
    {"axis", "1", "0|1",
     "1: groups of neighbouring input channels; 0: of one input channel across evenly spread "
     "outputs.",
     QM_OPT_I64, 0},
    {"norm", "0.7", "0.1..1.0", "Exponent p of the l_p norm whose error is minimised.", QM_OPT_F64,
     0},
    {"beta", "10", "0.001..1000000", "Weight of the quadratic term in the first iteration.",
     QM_OPT_F64, 0},
    {"kappa", "1.01", "1.0..10", "Factor by which beta grows per iteration.", QM_OPT_F64, 0},
    {"iterations", "20", "0..1000",
     "Iterations at most; it stops earlier when the error of the layer no longer falls.",
     QM_OPT_I64, 0},
    {"quantize_zero", "false", nullptr,
     "Store zero points as bytes with one range per layer (not in hqq files).", QM_OPT_BOOL, 0},
    {"quantize_scale", "false", nullptr,
     "Store scales as bytes with a range per 128 of them (not in hqq files).", QM_OPT_BOOL, 0},
};

struct Settings {
  Options options;
  std::vector<Step> steps;
};

// beta grows in f64; kernels see f32.
std::vector<Step> Steps(double norm, double beta, double kappa, int32_t iterations) {
  std::vector<Step> steps(static_cast<size_t>(iterations));
  for (Step& step : steps) {
    step.inverse_beta = static_cast<float>(1.0 / beta);
    step.threshold = static_cast<float>(std::pow(beta, -1.0 / (2.0 - norm)));
    beta *= kappa;
  }
  return steps;
}

qm_status CheckShape(qm_call* call, const qm_linear_info& info, int64_t group, int32_t axis) {
  if (info.out_features <= 0 || info.in_features <= 0) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "the linear has shape [", info.out_features, ", ",
                    info.in_features, "]; both features must be positive");
  }
  const int64_t grouped = axis == 1 ? info.in_features : info.out_features;
  if (group == 0 || group < -1 || (group > 0 && grouped % group != 0)) {
    const char* whole = axis == 1 ? "a whole row" : "a whole column";
    std::string sizes;
    for (int64_t size = 8; size <= 1024; size *= 2) {
      if (grouped % size == 0) sizes += qm::StrCat(size, ", ");
    }
    return qm::Fail(call, QM_INVALID_ARGUMENT, "group_size ", group, " does not divide ",
                    axis == 1 ? "in_features " : "out_features ", grouped, "; use ", sizes,
                    "or -1 (", whole, ")");
  }
  return QM_OK;
}

qm_status CheckSolver(qm_call* call, double norm, double beta, double kappa, int64_t iterations) {
  if (!(norm >= 0.1 && norm <= 1.0)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "norm ", norm, " is outside 0.1 .. 1.0");
  }
  if (!(beta >= 1e-3 && beta <= 1e6)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "beta ", beta, " is outside 0.001 .. 1e6");
  }
  if (!(kappa >= 1.0 && kappa <= 10.0)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "kappa ", kappa, " is outside 1 .. 10");
  }
  if (iterations < 0 || iterations > 1000) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "iterations ", iterations, " is outside 0 .. 1000");
  }
  return QM_OK;
}

qm_status ReadSettings(qm_call* call, const qm_linear_info& info, Settings* out) {
  Options& o = out->options;
  o.bits = static_cast<int32_t>(qm::OptionI64(call, "bits"));
  o.axis = static_cast<int32_t>(qm::OptionI64(call, "axis"));
  if (o.bits != 8 && (o.bits < 1 || o.bits > 4)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "bits ", o.bits,
                    " is not offered; use 8, 4, 3, 2 or 1");
  }
  if (o.axis != 0 && o.axis != 1) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "axis ", o.axis, " is not offered; use 0 or 1");
  }
  if (info.scale_dtype != QM_F16 && info.scale_dtype != QM_BF16 && info.scale_dtype != QM_F32) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "scale dtype code ", info.scale_dtype,
                    " cannot hold scales; use F16, BF16 or F32");
  }
  const int64_t group = qm::OptionI64(call, "group_size");
  QM_TRY(CheckShape(call, info, group, o.axis));
  const double norm = qm::OptionF64(call, "norm"), beta = qm::OptionF64(call, "beta");
  const double kappa = qm::OptionF64(call, "kappa");
  const int64_t iterations = qm::OptionI64(call, "iterations");
  QM_TRY(CheckSolver(call, norm, beta, kappa, iterations));
  o.out_features = info.out_features;
  o.in_features = info.in_features;
  const int64_t whole = o.axis == 1 ? info.in_features : info.out_features;
  o.group_size = group == -1 ? whole : group;
  o.norm = static_cast<float>(norm);
  o.iterations = static_cast<int32_t>(iterations);
  o.scale_dtype = info.scale_dtype;
  o.quantize_scale = qm::OptionBool(call, "quantize_scale");
  o.quantize_zero = qm::OptionBool(call, "quantize_zero");
  out->steps = Steps(norm, beta, kappa, o.iterations);
  return QM_OK;
}

// Canonical parameters of the format; a group of a whole row is always written as -1.
std::string FormatJson(const Options& o) {
  const int64_t whole = o.axis == 1 ? o.in_features : o.out_features;
  return qm::StrCat("{", o.axis == 0 ? "\"axis\":0," : "", "\"bits\":", o.bits,
                    ",\"group_size\":", o.group_size == whole ? -1 : o.group_size, ",",
                    o.quantize_scale ? "\"scale\":\"q8\"," : "", "\"zero\":\"",
                    o.quantize_zero ? "q8" : "float", "\"}");
}

// Of everything that EmitResult emits.
double BitsPerWeight(const Options& o) {
  const int32_t float_bits = o.scale_dtype == QM_F32 ? 32 : 16;
  const int64_t group_bits =
      (o.quantize_scale ? 8 : float_bits) + (o.quantize_zero ? 8 : float_bits);
  const int64_t range_bits =
      64 * ((o.quantize_scale ? o.scale_blocks() : 0) + (o.quantize_zero ? 1 : 0));
  return static_cast<double>(32 * o.out_features * o.words() + o.groups() * group_bits +
                             range_bits) /
         static_cast<double>(o.out_features * o.in_features);
}

qm_status Emit(qm_call* call, const char* name, qm_dtype dtype, int64_t rows, int64_t columns,
               qm_tensor* out) {
  const int64_t shape[2] = {rows, columns};
  return call->emit(call, 0, name, call->device, dtype, 2, shape, out);
}

qm_status EmitResult(qm_call* call, const Options& o, Result* out) {
  QM_TRY(Emit(call, "codes", QM_I32, o.out_features, o.words(), &out->codes));
  QM_TRY(Emit(call, "scale", o.quantize_scale ? QM_U8 : o.scale_dtype, o.scale_rows(),
              o.scale_columns(), &out->scale));
  QM_TRY(Emit(call, "zero", o.quantize_zero ? QM_U8 : o.scale_dtype, o.scale_rows(),
              o.scale_columns(), &out->zero));
  if (o.quantize_scale) {
    QM_TRY(Emit(call, "scale_range", QM_F32, o.scale_blocks(), 2, &out->scale_range));
  }
  if (o.quantize_zero) QM_TRY(Emit(call, "zero_range", QM_F32, 1, 2, &out->zero_range));
  return QM_OK;
}

qm_status Describe(qm_call* call, const Options& o, const Result& result, qm_packed* out) {
  const qm_device host = {QM_CPU, 0};
  const std::string json = FormatJson(o);
  const char* text = nullptr;
  QM_TRY(qm::ScratchString(call, json, "the result", &text));
  qm_named_tensor* named = nullptr;
  QM_TRY(qm::Scratch(call, host, 5, "the result", &named));
  uint64_t count = 0;
  named[count++] = {"codes", result.codes};
  named[count++] = {"scale", result.scale};
  named[count++] = {"zero", result.zero};
  if (o.quantize_scale) named[count++] = {"scale_range", result.scale_range};
  if (o.quantize_zero) named[count++] = {"zero_range", result.zero_range};
  *out = {qm::kAffineIntFormat, text, named, count, o.out_features, o.in_features};
  return QM_OK;
}

struct Hqq {
  static qm_status Plan(qm_call* call, const qm_linear_info& info, qm_quant_plan* out) {
    Settings settings;
    QM_TRY(ReadSettings(call, info, &settings));
    constexpr uint64_t kDescription = 4096;  // names and parameters of the result
    out->stats = nullptr;
    out->stat_count = 0;
    out->scratch_bytes = kDescription;
    if (call->device.kind == QM_CPU) out->scratch_bytes += CpuScratchBytes(settings.options);
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) out->scratch_bytes += CudaScratchBytes(settings.options);
#endif
    out->scratch_bytes_shared = 0;
    // About 12 operations a weight and iteration; every iteration is run twice.
    out->flops = 12.0 * (2.0 * settings.options.iterations + 2.0) *
                 static_cast<double>(info.out_features) * static_cast<double>(info.in_features);
    return qm::PlanFormat(call, qm::kAffineIntFormat, FormatJson(settings.options),
                          BitsPerWeight(settings.options), out);
  }

  static qm_status Run(qm_call* call, const qm_linear_info& info, const qm_tensor& weight,
                       const qm_stats*, qm_packed* out) {
    Settings settings;
    QM_TRY(ReadSettings(call, info, &settings));
    qm::TensorView<const float> view;
    QM_TRY(qm::ViewMatrix<float>(call, weight, "the weight", call->device, info.out_features,
                                 info.in_features, &view));
    Result result;
    QM_TRY(EmitResult(call, settings.options, &result));
    QM_TRY(Quantize(call, settings, view, result));
    return Describe(call, settings.options, result, out);
  }

 private:
  static qm_status Quantize(qm_call* call, const Settings& settings,
                            qm::TensorView<const float> weight, const Result& result) {
    if (call->device.kind == QM_CPU) {
      return QuantizeCpu(call, settings.options, settings.steps, weight, result);
    }
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) {
      return QuantizeCuda(call, settings.options, settings.steps, weight, result);
    }
#endif
    return qm::Fail(call, QM_FAILED_PRECONDITION,
                    "this build of hqq has no CUDA kernels; use device cpu");
  }
};

constexpr qm_quantize_linear kQuantizeLinear = qm::QuantizeLinearTable<Hqq>::Make();

const void* Ext(const qm_method*, const char* id) noexcept {
  return std::string_view(id) == QM_EXT_QUANTIZE_LINEAR ? &kQuantizeLinear : nullptr;
}

constexpr qm_method kMethod = {
    sizeof(qm_method),
    "hqq",
    "0.1.0",
    "Half-quadratic quantization: zero points from a robust fit, 8, 4, 3, 2 or 1 bits, no data",
    kOptions,
    std::size(kOptions),
    QM_METHOD_DETERMINISTIC,
    &Ext};
constexpr const qm_method* kMethods[] = {&kMethod};
constexpr qm_plugin kPlugin = {sizeof(qm_plugin), QM_ABI_MAJOR, QM_ABI_MINOR,      0, 1, kMethods,
                               "quantmill",       "Apache-2.0", "C++ " __VERSION__};

}  // namespace
}  // namespace quantmill::hqq

QM_PLUGIN_ENTRY(quantmill::hqq::kPlugin)
