// The plugin's tables: a stage, a kernel, a format.
#include <cstring>
#include <iterator>

#include "nf4.h"
#if defined(QM_HAVE_CUDA)
#include "nf4_cuda.h"
#endif

namespace quantmill::nf4 {
namespace {

constexpr qm_option kOptions[] = {
    {"type", "nf4", "nf4|fp4",
     "Codebook: nf4, quantiles of the normal distribution; fp4, a float of four bits.", QM_OPT_ENUM,
     0},
    {"block_size", "64", "32|64|128|256|512|1024|2048|4096",
     "Weights of the flat row-major matrix that share a factor.", QM_OPT_I64, 0},
    {"double_quant", "false", nullptr, "Store the factors as bytes with a range per 256 of them.",
     QM_OPT_BOOL, 0},
};

bool IsFloat(qm_dtype dtype) { return dtype == QM_F32 || dtype == QM_F16 || dtype == QM_BF16; }

bool Same(qm_device a, qm_device b) { return a.kind == b.kind && a.index == b.index; }

qm_status ReadForKernel(qm_call* call, const qm_packed& packed, Weight* w) {
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    if (Same(packed.tensors[i].tensor.device, call->device)) continue;
    return qm::Fail(call, QM_INVALID_ARGUMENT, "packed tensors are not on the device of the call");
  }
  QM_TRY(ReadWeight(call, packed, /*prepacked=*/true, w));
  if (w->tiles == nullptr || call->device.kind == QM_CUDA) return QM_OK;
  return qm::Fail(call, QM_INVALID_ARGUMENT, "weight was prepacked for CUDA; pass the original");
}

qm_status CheckMatrix(qm_call* call, const qm_tensor& t, const char* what, int64_t columns) {
  if (t.rank != 2 || t.shape[1] != columns || !IsFloat(t.dtype) || !IsContiguous(t)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, what, " must be a contiguous float matrix with ",
                    columns, " columns");
  }
  if (!Same(t.device, call->device)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, what, " is not on the device of the call");
  }
  return QM_OK;
}

// ---- qm.linear-kernel/1 ------------------------------------------------------------------------

int32_t Accepts(const char* format_id, const char* format_json, qm_device_kind device, int32_t sm,
                qm_dtype activation) noexcept {
  if (std::strcmp(format_id, kFormatId) != 0 || !IsFloat(activation)) return 0;
  try {
    Params params;
    std::string why;
    if (!ParseParams(format_json, &params, &why)) return 0;
  } catch (...) {
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

qm_status Matmul(qm_call* call, const qm_packed* packed, const qm_tensor* x, void*,
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
    if (call->device.kind == QM_CUDA) return CudaMatmul(call, w, *x, y);
#endif
    return CpuMatmul(call, w, *x, y);
  });
}

qm_status Prepack(qm_call* call, const qm_packed* packed, qm_packed* out) noexcept {
  return qm::guard(call, [&]() -> qm_status {
    Weight w;
    QM_TRY(ReadForKernel(call, *packed, &w));
    if (w.tiles != nullptr) {
      return qm::Fail(call, QM_FAILED_PRECONDITION, "weight is prepacked already");
    }
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) return CudaPrepack(call, w, out);
#endif
    (void)out;
    return qm::Fail(call, QM_UNIMPLEMENTED, "the CPU multiplies from the layout of the format");
  });
}

constexpr qm_linear_kernel kKernel = {
    sizeof(qm_linear_kernel), &Accepts, &Dequantize, &Prepack, nullptr, &Matmul, nullptr};

// ---- qm.format/1 -------------------------------------------------------------------------------

constexpr const char* kTargets[] = {kTarget};

qm_status Check(qm_call* call, const qm_packed* packed) noexcept {
  return qm::guard(call, [&]() -> qm_status {
    Weight w;
    QM_TRY(ReadWeight(call, *packed, /*prepacked=*/false, &w));
    return CheckValues(call, w);
  });
}

qm_status CanStoreEntry(qm_call* call, const char* target, const char* format_json, int64_t out,
                        int64_t in) noexcept {
  return qm::guard(call, [&] { return CanStore(call, target, format_json, out, in); });
}

qm_status ToCheckpointEntry(qm_call* call, const char* target, const char* layer,
                            const qm_packed* packed, const qm_named_tensor** out, uint64_t* count,
                            const char** config_json) noexcept {
  return qm::guard(
      call, [&] { return ToCheckpoint(call, target, layer, *packed, out, count, config_json); });
}

qm_status FromCheckpointEntry(qm_call* call, const char* target, const char* layer,
                              const qm_named_tensor* tensors, uint64_t count,
                              const char* config_json, qm_packed* out) noexcept {
  return qm::guard(
      call, [&] { return FromCheckpoint(call, target, layer, tensors, count, config_json, out); });
}

constexpr qm_format kFormat = {sizeof(qm_format),
                               kFormatId,
                               kTargets,
                               std::size(kTargets),
                               0,
                               &Check,
                               &CanStoreEntry,
                               &ToCheckpointEntry,
                               &FromCheckpointEntry};

// ---- descriptor --------------------------------------------------------------------------------

const void* Ext(const qm_method*, const char* id) noexcept {
  if (std::strcmp(id, QM_EXT_QUANTIZE_LINEAR) == 0) return QuantizeLinearTable();
  if (std::strcmp(id, QM_EXT_LINEAR_KERNEL) == 0) return &kKernel;
  if (std::strcmp(id, QM_EXT_FORMAT) == 0) return &kFormat;
  return nullptr;
}

constexpr qm_method kMethod = {
    sizeof(qm_method),
    "nf4",
    "0.1.0",
    "NF4 and FP4: four-bit codebooks with a factor per block, as QLoRA uses them, no data",
    kOptions,
    std::size(kOptions),
    QM_METHOD_DETERMINISTIC,
    &Ext};
constexpr const qm_method* kMethods[] = {&kMethod};
constexpr qm_plugin kPlugin = {sizeof(qm_plugin), QM_ABI_MAJOR, QM_ABI_MINOR,      0, 1, kMethods,
                               "quantmill",       "Apache-2.0", "C++ " __VERSION__};

}  // namespace
}  // namespace quantmill::nf4

QM_PLUGIN_ENTRY(quantmill::nf4::kPlugin)
