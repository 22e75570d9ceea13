// aqlm: additive quantization. Groups of weights become sums of vectors from codebooks, fitted to
// the outputs of the layer.
#include "quantmill/sdk/plugin.hpp"

#include <iterator>

#include "codebook_format.h"
#include "options.h"
#include "quantmill/sdk/tables.hpp"
#include "solver.h"
#include "tune.h"

namespace quantmill::aqlm {
namespace {

constexpr qm_option kOptions[] = {
    {"scheme", "2x8", nullptr,
     "Codebooks x bits of an index: 2x8, 1x16, 1x8 or any MxB with M 1..16 and B 1..16.",
     QM_OPT_STR, 0},
    {"group_size", "8", "1..128",
     "Neighbouring weights that become one sum; must divide "
     "in_features.",
     QM_OPT_I64, 0},
    {"tolerance", "0.01", "0.0..0.5",
     "Stop when searching codes and refitting codebooks lowers the loss by a smaller part.",
     QM_OPT_F64, 0},
    {"beam", "1", "1..16", "Hypotheses per row that a search for codes carries along.", QM_OPT_I64,
     0},
    {"steps", "100", "0..10000",
     "Steps of each fit of the codebooks at most; it ends earlier when they no longer help.",
     QM_OPT_I64, 0},
    {"tune", "false", nullptr,
     "Tune codebooks and scales of a whole block to its output, after its linears are packed.",
     QM_OPT_BOOL, 0},
};

constexpr qm_stat_request kStats[] = {{QM_STAT_HESSIAN, 0, QM_F32, 0}};

// Names and parameters of the result.
constexpr uint64_t kDescriptionBytes = 4096;

// A guess from runs on small models: twelve alternations of ten steps each.
double Flops(const Options& o) {
  const double weights = static_cast<double>(o.out) * static_cast<double>(o.in);
  const double products = 12.0 * 12.0 * 2.0 * weights * static_cast<double>(o.in);
  const double scans = (12.0 * o.beam + 30.0) * 2.0 * weights * o.params.codebooks *
                       static_cast<double>(o.params.length());
  return products + scans;
}

qm_status EmitResult(qm_call* call, const Options& o, Result* out) {
  const Params& p = o.params;
  const int64_t codes[3] = {o.out, o.groups(), p.codebooks};
  const int64_t codebooks[3] = {p.codebooks, p.length(), p.group_size};
  QM_TRY(call->emit(call, 0, "codes", call->device, p.code_dtype(), 3, codes, &out->codes));
  QM_TRY(
      call->emit(call, 0, "codebooks", call->device, o.value_dtype, 3, codebooks, &out->codebooks));
  return call->emit(call, 0, "scales", call->device, o.value_dtype, 1, &o.out, &out->scales);
}

struct Quantizer {
  static qm_status Plan(qm_call* call, const qm_linear_info& info, qm_quant_plan* out) {
    Options options;
    QM_TRY(ReadOptions(call, info, &options));
    out->stats = kStats;
    out->stat_count = 1;
    out->scratch_bytes = kDescriptionBytes + SolverBytes(options);
    if (call->device.kind == QM_CPU) out->scratch_bytes += CpuKernelBytes(options);
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) out->scratch_bytes += CudaKernelBytes(options);
#endif
    out->scratch_bytes_shared = 0;
    out->flops = Flops(options);
    return qm::PlanFormat(
        call, kFormatName, ParamsJson(options.params),
        BitsPerWeight(options.params, options.out, options.in, options.value_dtype), out);
  }

  static qm_status Run(qm_call* call, const qm_linear_info& info, const qm_tensor& weight,
                       const qm_stats* stats, qm_packed* out) {
    Options options;
    QM_TRY(ReadOptions(call, info, &options));
    qm::TensorView<const float> view, hessian_view;
    QM_TRY(qm::ViewMatrix<float>(call, weight, "the weight", call->device, options.out, options.in,
                                 &view));
    const qm_tensor* hessian = nullptr;
    if (stats != nullptr && stats->row_count > 0) hessian = qm::FindStat(stats, QM_STAT_HESSIAN);
    if (hessian != nullptr) {
      QM_TRY(qm::ViewMatrix<float>(call, *hessian, "the Hessian", call->device, options.in,
                                   options.in, &hessian_view));
    } else {
      qm::Log(call, qm::Severity::kWarning, info.name, ": no calibration rows reached this layer; ",
              "its weights are approximated as if all inputs counted alike");
    }
    std::unique_ptr<Kernels> kernels;
    QM_TRY(MakeKernels(call, options, &kernels));
    Result result;
    QM_TRY(EmitResult(call, options, &result));
    QM_TRY(Solve(call, *kernels, options, {view.data(), view.stride(0)}, hessian, result, nullptr));
    qm_named_tensor* named = nullptr;
    QM_TRY(qm::Scratch(call, kHost, 3, "the result", &named));
    named[0] = {"codes", result.codes};
    named[1] = {"codebooks", result.codebooks};
    named[2] = {"scales", result.scales};
    const char* json = nullptr;
    QM_TRY(qm::ScratchString(call, ParamsJson(options.params), "the parameters", &json));
    *out = {kFormatName, json, named, 3, options.out, options.in};
    return QM_OK;
  }
};

bool OnDevice(const qm_tensor& tensor, qm_device device) {
  return tensor.device.kind == device.kind && tensor.device.index == device.index;
}

qm_status ReadForKernel(qm_call* call, const qm_packed& packed, Weight* out) {
  QM_TRY(ReadWeight(call, packed, out));
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    if (OnDevice(packed.tensors[i].tensor, call->device)) continue;
    return qm::Fail(call, QM_INVALID_ARGUMENT, "packed tensors are not on the device of the call");
  }
  return QM_OK;
}

qm_status CheckMatrix(qm_call* call, const qm_tensor& t, const char* what, int64_t columns) {
  if (t.rank != 2 || t.shape[1] != columns || !IsFloat(t.dtype) || !IsContiguous(t) ||
      !OnDevice(t, call->device)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, what, " must be a contiguous float matrix with ",
                    columns, " columns on the device of the call");
  }
  return QM_OK;
}

struct Kernel {
  static int32_t Accepts(const char* format_id, const char* format_json, qm_device_kind device,
                         int32_t sm, qm_dtype activation) {
    Params params;
    std::string why;
    if (std::strcmp(format_id, kFormatName) != 0 || !IsFloat(activation) ||
        !ParseParams(format_json, &params, &why)) {
      return 0;
    }
    constexpr int32_t kScore = 100;
    if (device == QM_CPU) return activation == QM_F32 ? kScore : 0;
#if defined(QM_HAVE_CUDA)
    if (device == QM_CUDA && sm >= 80) return kScore;
#else
    (void)sm;
#endif
    return 0;
  }

  static qm_status Dequantize(qm_call* call, const qm_packed& packed, qm_tensor* weight) {
    Weight w;
    QM_TRY(ReadForKernel(call, packed, &w));
    QM_TRY(CheckMatrix(call, *weight, "the dense weight", w.in));
    if (weight->shape[0] != w.out) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "the dense weight must have ", w.out, " rows");
    }
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) return CudaDequantize(call, w, weight);
#endif
    return CpuDequantize(call, w, weight);
  }

  static qm_status Matmul(qm_call* call, const qm_packed& packed, const qm_tensor& x, void*,
                          qm_tensor* y) {
    Weight w;
    QM_TRY(ReadForKernel(call, packed, &w));
    QM_TRY(CheckMatrix(call, x, "x", w.in));
    QM_TRY(CheckMatrix(call, *y, "y", w.out));
    if (x.shape[0] != y->shape[0] || x.dtype != y->dtype) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "x and y must have equal rows and dtypes");
    }
    if (x.shape[0] == 0) return QM_OK;
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) return CudaMatmul(call, w, x, y);
#endif
    return CpuMatmul(call, w, x, y);
  }
};

struct Format {
  static constexpr const char* kFormatId = kFormatName;
  static constexpr const auto& kTargets = aqlm::kTargets;
  static constexpr uint64_t kFlags = 0;  // every linear has codebooks of its own

  static qm_status Check(qm_call* call, const qm_packed& packed) {
    Weight w;
    QM_TRY(ReadWeight(call, packed, &w));
    return CheckValues(call, w);
  }
  static qm_status CanStore(qm_call* call, const char* target, const char* format_json, int64_t out,
                            int64_t in) {
    return aqlm::CanStore(call, target, format_json, out, in);
  }
  static qm_status ToCheckpoint(qm_call* call, const char* target, const char* layer,
                                const qm_packed& packed, const qm_named_tensor** out,
                                uint64_t* count, const char** config_json) {
    return aqlm::ToCheckpoint(call, target, layer, packed, out, count, config_json);
  }
  static qm_status FromCheckpoint(qm_call* call, const char* target, const char* layer,
                                  const qm_named_tensor* tensors, uint64_t count,
                                  const char* config_json, qm_packed* out) {
    return aqlm::FromCheckpoint(call, target, layer, tensors, count, config_json, out);
  }
};

constexpr qm_quantize_linear kQuantize = qm::QuantizeLinearTable<Quantizer>::Make();
constexpr qm_linear_kernel kKernel = qm::LinearKernelTable<Kernel>::Make();
constexpr qm_format kFormat = qm::FormatTable<Format>::Make();
constexpr qm_block_tune kTune = qm::BlockTuneTable<BlockTuner>::Make();

const void* Ext(const qm_method*, const char* id) noexcept {
  const std::string_view name = id;
  if (name == QM_EXT_QUANTIZE_LINEAR) return &kQuantize;
  if (name == QM_EXT_LINEAR_KERNEL) return &kKernel;
  if (name == QM_EXT_FORMAT) return &kFormat;
  if (name == QM_EXT_BLOCK_TUNE) return &kTune;
  return nullptr;
}

constexpr qm_method kMethod = {
    sizeof(qm_method),
    "aqlm",
    "0.1.0",
    "Additive quantization: sums of codebook vectors fitted to the layer's outputs, about 2 bits",
    kOptions,
    std::size(kOptions),
    QM_METHOD_DETERMINISTIC,
    &Ext};
constexpr const qm_method* kMethods[] = {&kMethod};
constexpr qm_plugin kPlugin = {sizeof(qm_plugin), QM_ABI_MAJOR, QM_ABI_MINOR,      0, 1, kMethods,
                               "quantmill",       "Apache-2.0", "C++ " __VERSION__};

}  // namespace
}  // namespace quantmill::aqlm

QM_PLUGIN_ENTRY(quantmill::aqlm::kPlugin)
