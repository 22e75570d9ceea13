// eetq: INT8 weights with a scale per output channel, or FP8; no calibration data. Beside the
// method the plugin owns the formats of such weights: qm.fmt.int8-row/1 (with the method) and
// qm.fmt.float8/1 (method `float8`, which is no stage).
#include <cstring>
#include <iterator>

#include "quantize.h"
#include "quantmill/sdk/tables.hpp"
#include "row8.h"

namespace eetq {
namespace {

// ---- qm.quantize-linear/1 -----------------------------------------------------------------------

constexpr qm_option kOptions[] = {
    {"dtype", "int8", "int8|fp8_e4m3",
     "int8: symmetric per output channel, scale = largest |w| / 128; fp8_e4m3: 8-bit floats, scale "
     "= "
     "largest |w| / 448.",
     QM_OPT_ENUM, 0},
};

struct Eetq {
  static qm_status Layout(qm_call* call, const qm_linear_info& info, qm::Row8Layout* out) {
    QM_TRY(qm::CheckRow8Info(call, info));
    const std::string_view dtype = qm::OptionStr(call, "dtype");
    if (dtype == "int8") {
      *out = qm::Int8RowLayout(info, /*int8_activations=*/false);
    } else if (dtype == "fp8_e4m3") {
      *out = qm::Float8Layout(info, qm::Float8Rule());
    } else {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "dtype \"", dtype,
                      "\" is not offered; use int8 or fp8_e4m3");
    }
    return QM_OK;
  }

  static qm_status Plan(qm_call* call, const qm_linear_info& info, qm_quant_plan* out) {
    qm::Row8Layout layout;
    QM_TRY(Layout(call, info, &layout));
    uint64_t scratch = 4096;  // names and parameters of the result
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) scratch += CudaScratchBytes(layout);
#endif
    // Compare, divide, round, clamp: about 10 operations a weight.
    qm::FillPlan(
        out, layout.format_id, scratch,
        10.0 * static_cast<double>(info.out_features) * static_cast<double>(info.in_features));
    return qm::PlanRow8(call, layout, out);
  }

  static qm_status Run(qm_call* call, const qm_linear_info& info, const qm_tensor& weight,
                       const qm_stats*, qm_packed* out) {
    qm::Row8Layout layout;
    QM_TRY(Layout(call, info, &layout));
    qm::TensorView<const float> view;
    QM_TRY(qm::ViewMatrix<float>(call, weight, "the weight", call->device, info.out_features,
                                 info.in_features, &view));
    qm::Row8Tensors tensors;
    QM_TRY(qm::EmitRow8(call, layout, &tensors));
    QM_TRY(Quantize(call, layout, view, tensors));
    return qm::DescribeRow8(call, layout, tensors, out);
  }

 private:
  static qm_status Quantize(qm_call* call, const qm::Row8Layout& layout,
                            qm::TensorView<const float> weight, const qm::Row8Tensors& tensors) {
    const bool is_int = layout.code_dtype == QM_I8;
    if (call->device.kind == QM_CPU) {
      return is_int ? QuantizeInt8Cpu(call, layout, weight, tensors)
                    : qm::QuantizeFloat8Cpu(call, layout, weight, tensors);
    }
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) {
      return is_int ? QuantizeInt8Cuda(call, layout, weight, tensors)
                    : QuantizeFp8Cuda(call, layout, weight, tensors);
    }
#endif
    return qm::Fail(call, QM_FAILED_PRECONDITION,
                    "this build of eetq has no CUDA kernels; use device cpu");
  }
};

constexpr qm_quantize_linear kQuantizeLinear = qm::QuantizeLinearTable<Eetq>::Make();

// ---- qm.linear-kernel/1 -------------------------------------------------------------------------

bool IsFloat(qm_dtype dtype) { return dtype == QM_F32 || dtype == QM_F16 || dtype == QM_BF16; }

qm_status ReadForKernel(qm_call* call, const qm_packed& packed, Weight* w) {
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    const qm_device d = packed.tensors[i].tensor.device;
    if (d.kind != call->device.kind || d.index != call->device.index) {
      return qm::Fail(call, QM_INVALID_ARGUMENT,
                      "packed tensors are not on the device of the call");
    }
  }
  return ReadWeight(call, packed, w);
}

qm_status CheckMatrix(qm_call* call, const qm_tensor& t, const char* what, int64_t columns) {
  if (t.rank != 2 || t.shape[1] != columns || !IsFloat(t.dtype) || !IsContiguous(t)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, what, " must be a contiguous float matrix with ",
                    columns, " columns");
  }
  if (t.device.kind != call->device.kind || t.device.index != call->device.index) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, what, " is not on the device of the call");
  }
  return QM_OK;
}

// Both methods of this plugin, so both formats, have the kernel; the host takes the first.
int32_t Accepts(const char* format_id, const char* format_json, qm_device_kind device, int32_t sm,
                qm_dtype activation) noexcept {
  constexpr int32_t kScore = 100;
  if (!IsFloat(activation)) return 0;
  try {
    Params params;
    if (!ParseParams(format_id, format_json, &params)) return 0;
  } catch (...) {
    return 0;
  }
  if (device == QM_CPU) return activation == QM_F32 ? kScore : 0;
#if defined(QM_HAVE_CUDA)
  if (device == QM_CUDA && sm >= 80) return kScore;
#else
  (void)sm;
#endif
  return 0;
}

qm_status Dequantize(qm_call* call, const qm_packed* packed, qm_tensor* weight) noexcept {
  return qm::guard(call, [&]() -> qm_status {
    Weight w;
    QM_TRY(ReadForKernel(call, *packed, &w));
    QM_TRY(CheckMatrix(call, *weight, "the dense weight", w.in));
    if (weight->shape[0] != w.out) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "the dense weight must have ", w.out, " rows");
    }
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) return CudaDequantize(call, w, weight);
#endif
    return CpuDequantize(call, w, weight);
  });
}

uint64_t WorkspaceBytes(const qm_packed* packed, int64_t max_rows) noexcept {
#if defined(QM_HAVE_CUDA)
  if (packed->tensor_count == 0 || packed->tensors[0].tensor.device.kind != QM_CUDA) return 0;
  // Without an open call there is nobody to report to; a weight that cannot be read needs nothing.
  try {
    qm_call silent = {};
    silent.fail = [](qm_call*, qm_status code, const char*) noexcept { return code; };
    Weight w;
    return ReadWeight(&silent, *packed, &w) == QM_OK ? CudaWorkspaceBytes(w, max_rows) : 0;
  } catch (...) {
    return 0;
  }
#else
  (void)packed;
  (void)max_rows;
  return 0;
#endif
}

qm_status Matmul(qm_call* call, const qm_packed* packed, const qm_tensor* x, void* workspace,
                 qm_tensor* y) noexcept {
  return qm::guard(call, [&]() -> qm_status {
    Weight w;
    QM_TRY(ReadForKernel(call, *packed, &w));
    QM_TRY(CheckMatrix(call, *x, "x", w.in));
    QM_TRY(CheckMatrix(call, *y, "y", w.out));
    if (x->shape[0] != y->shape[0] || x->dtype != y->dtype) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "x and y must have equal rows and dtypes");
    }
    if (x->shape[0] == 0) return QM_OK;
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) return CudaMatmul(call, w, *x, workspace, y);
#else
    (void)workspace;
#endif
    return CpuMatmul(call, w, *x, y);
  });
}

constexpr qm_linear_kernel kKernel = {sizeof(qm_linear_kernel), &Accepts, &Dequantize, nullptr,
                                      &WorkspaceBytes,          &Matmul,  nullptr};

// ---- qm.format/1 --------------------------------------------------------------------------------

qm_status Check(qm_call* call, const qm_packed* packed) noexcept {
  return qm::guard(call, [&]() -> qm_status {
    Weight w;
    QM_TRY(ReadWeight(call, *packed, &w));
    return CheckValues(call, w);
  });
}

qm_status ToCheckpointEntry(qm_call* call, const char* target, const char* layer,
                            const qm_packed* packed, const qm_named_tensor** out, uint64_t* count,
                            const char** config_json) noexcept {
  return qm::guard(call, [&]() -> qm_status {
    Weight w;
    QM_TRY(ReadWeight(call, *packed, &w));
    return ToCheckpoint(call, target, layer, w, out, count, config_json);
  });
}

// The table of one format.
template <const char* kFormatId>
struct FormatOf {
  static qm_status CheckOne(qm_call* call, const qm_packed* packed) noexcept {
    if (std::strcmp(packed->format_id, kFormatId) == 0) return Check(call, packed);
    return qm::guard(call, [&] {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "weight has format '", packed->format_id,
                      "'; expected ", kFormatId);
    });
  }
  static qm_status CanStoreEntry(qm_call* call, const char* target, const char* format_json,
                                 int64_t out, int64_t in) noexcept {
    return qm::guard(call, [&]() -> qm_status {
      Params params;
      if (!ParseParams(kFormatId, format_json, &params)) {
        return qm::Fail(call, QM_INVALID_ARGUMENT, "parameters '", format_json,
                        "' are not those of ", kFormatId);
      }
      return CanStore(call, target, params, out, in);
    });
  }
  static qm_status From(qm_call* call, const char* target, const char* layer,
                        const qm_named_tensor* tensors, uint64_t count, const char* config_json,
                        qm_packed* out) noexcept {
    return qm::guard(call, [&] {
      return FromCheckpoint(call, kFormatId, target, layer, tensors, count, config_json, out);
    });
  }
  static constexpr qm_format Make(const char* const* targets, uint64_t count, uint64_t flags) {
    return {sizeof(qm_format), kFormatId,          targets, count, flags, &CheckOne,
            &CanStoreEntry,    &ToCheckpointEntry, &From};
  }
};

constexpr qm_format kInt8Row =
    FormatOf<qm::kInt8RowFormat>::Make(kTargets, std::size(kTargets), QM_FORMAT_CONCAT_ROWS);
// Weights with one scale for all cannot be joined.
constexpr qm_format kFloat8 = FormatOf<qm::kFloat8Format>::Make(kTargets + 1, 1, 0);

// ---- the plugin ---------------------------------------------------------------------------------

const void* EetqExt(const qm_method*, const char* id) noexcept {
  if (std::strcmp(id, QM_EXT_QUANTIZE_LINEAR) == 0) return &kQuantizeLinear;
  if (std::strcmp(id, QM_EXT_LINEAR_KERNEL) == 0) return &kKernel;
  if (std::strcmp(id, QM_EXT_FORMAT) == 0) return &kInt8Row;
  return nullptr;
}

const void* Float8Ext(const qm_method*, const char* id) noexcept {
  if (std::strcmp(id, QM_EXT_LINEAR_KERNEL) == 0) return &kKernel;
  if (std::strcmp(id, QM_EXT_FORMAT) == 0) return &kFloat8;
  return nullptr;
}

constexpr qm_method kEetqMethod = {sizeof(qm_method),
                                   "eetq",
                                   "0.1.0",
                                   "INT8 or FP8 weights with a scale per output channel, no data",
                                   kOptions,
                                   std::size(kOptions),
                                   QM_METHOD_DETERMINISTIC,
                                   &EetqExt};
constexpr qm_method kFloat8Method = {sizeof(qm_method),
                                     "float8",
                                     "0.1.0",
                                     "Products with and checkpoints of 8-bit floats",
                                     nullptr,
                                     0,
                                     QM_METHOD_DETERMINISTIC | QM_METHOD_NO_STAGE,
                                     &Float8Ext};
constexpr const qm_method* kMethods[] = {&kEetqMethod, &kFloat8Method};

#if defined(QM_HAVE_CUDA)
#define QM_EETQ_BUILD "gcc " __VERSION__ ", with CUDA"
#else
#define QM_EETQ_BUILD "gcc " __VERSION__ ", without CUDA"
#endif
constexpr qm_plugin kPlugin = {sizeof(qm_plugin), QM_ABI_MAJOR, QM_ABI_MINOR, 0, 2, kMethods,
                               "quantmill",       "Apache-2.0", QM_EETQ_BUILD};

}  // namespace
}  // namespace eetq

QM_PLUGIN_ENTRY(eetq::kPlugin)
