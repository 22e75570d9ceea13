// The plugin's tables: one format, one kernel, no stage.
#include <cstring>
#include <iterator>

#include "affine_gguf.h"
#if defined(QM_HAVE_CUDA)
#include "affine_cuda.h"
#endif

namespace affine {
namespace {

bool IsFloat(qm_dtype dtype) { return dtype == QM_F32 || dtype == QM_F16 || dtype == QM_BF16; }

bool OnDevice(const qm_packed& packed, qm_device device) {
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    const qm_device d = packed.tensors[i].tensor.device;
    if (d.kind != device.kind || d.index != device.index) return false;
  }
  return true;
}

qm_status ReadForKernel(qm_call* call, const qm_packed& packed, Weight* w) {
  if (!OnDevice(packed, call->device)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "packed tensors are not on the device of the call");
  }
  QM_TRY(ReadWeight(call, packed, /*prepacked=*/true, w));
  if (w->tiles != nullptr && call->device.kind != QM_CUDA) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "weight was prepacked for CUDA; pass the original");
  }
  return QM_OK;
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

// ---- qm.linear-kernel/1
// --------------------------------------------------------------------------

int32_t Accepts(const char* format_id, const char* format_json, qm_device_kind device, int32_t sm,
                qm_dtype activation) noexcept {
  if (std::strcmp(format_id, qm::kAffineIntFormat) != 0 || !IsFloat(activation)) return 0;
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

qm_status Prepack(qm_call* call, const qm_packed* packed, qm_packed* out) noexcept {
  return qm::guard(call, [&]() -> qm_status {
    Weight w;
    QM_TRY(ReadForKernel(call, *packed, &w));
    if (w.tiles != nullptr || w.permutation != nullptr) {
      return qm::Fail(call, QM_FAILED_PRECONDITION, "weight is prepacked already");
    }
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) return CudaPrepack(call, w, out);
#endif
    return CpuPrepack(call, *packed, w, out);
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
    if (ReadWeight(&silent, *packed, /*prepacked=*/true, &w) != QM_OK) return 0;
    return CudaWorkspaceBytes(w, max_rows);
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

constexpr qm_linear_kernel kKernel = {sizeof(qm_linear_kernel), &Accepts, &Dequantize, &Prepack,
                                      &WorkspaceBytes,          &Matmul,  nullptr};

// ---- qm.format/1
// ---------------------------------------------------------------------------------

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

constexpr qm_format kFormat = {sizeof(qm_format),      qm::kAffineIntFormat,  kAllTargets,
                               std::size(kAllTargets), QM_FORMAT_CONCAT_ROWS, &Check,
                               &CanStoreEntry,         &ToCheckpointEntry,    &FromCheckpointEntry};

const void* Ext(const qm_method*, const char* id) noexcept {
  if (std::strcmp(id, QM_EXT_LINEAR_KERNEL) == 0) return &kKernel;
  if (std::strcmp(id, QM_EXT_FORMAT) == 0) return &kFormat;
  return nullptr;
}

constexpr qm_method kMethod = {
    sizeof(qm_method),
    "affine",
    "0.1.0",
    "Products with and checkpoints of integer codes with a scale per group",
    nullptr,
    0,
    QM_METHOD_DETERMINISTIC | QM_METHOD_NO_STAGE,
    &Ext};
constexpr const qm_method* kMethods[] = {&kMethod};

#if defined(QM_HAVE_CUDA)
#define QM_AFFINE_BUILD "gcc " __VERSION__ ", with CUDA"
#else
#define QM_AFFINE_BUILD "gcc " __VERSION__ ", without CUDA"
#endif
constexpr qm_plugin kPlugin = {sizeof(qm_plugin), QM_ABI_MAJOR, QM_ABI_MINOR,   0, 1, kMethods,
                               "quantmill",       "Apache-2.0", QM_AFFINE_BUILD};

}  // namespace
}  // namespace affine

QM_PLUGIN_ENTRY(affine::kPlugin)
