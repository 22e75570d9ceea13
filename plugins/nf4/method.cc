// The stage: options, plan, and what a call emits.
#include <algorithm>
#include <array>
#include <cmath>

#include "nf4.h"
#include "nf4_math.h"

namespace quantmill::nf4 {
namespace {

qm_status ReadOptions(qm_call* call, const qm_linear_info& info, Params* out) {
  const std::string_view type = qm::OptionStr(call, "type");
  if (type != "nf4" && type != "fp4") {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "type '", std::string(type),
                    "' is not offered; use nf4 or fp4");
  }
  out->fp4 = type == "fp4";
  out->block_size = qm::OptionI64(call, "block_size");
  if (!ValidBlockSize(out->block_size)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "block_size ", out->block_size,
                    " is not offered; use 32, 64, 128, 256, 512, 1024, 2048 or 4096");
  }
  out->nested_block_size = qm::OptionBool(call, "double_quant") ? kNestedBlock : 0;
  if (info.out_features <= 0 || info.in_features <= 0) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "the linear has shape [", info.out_features, ", ",
                    info.in_features, "]; both features must be positive");
  }
  out->dtype =
      info.weight_dtype == QM_F16 || info.weight_dtype == QM_F32 ? info.weight_dtype : QM_BF16;
  return QM_OK;
}

// Constants of the format, from host memory that outlives the call.
qm_status FillConstant(qm_call* call, const float* values, int64_t count, const qm_tensor& out) {
  if (call->device.kind == QM_CPU) {
    std::copy_n(values, count, static_cast<float*>(out.data));
    return QM_OK;
  }
#if defined(QM_HAVE_CUDA)
  return CopyToDevice(call, values, count, out);
#else
  return qm::Fail(call, QM_FAILED_PRECONDITION, "this build of nf4 has no CUDA kernels");
#endif
}

qm_status EmitResult(qm_call* call, const Params& p, int64_t n, Emitter* emitter, Result* out) {
  const bool nested = p.nested_block_size > 0;
  const qm_device device = call->device;
  QM_TRY(emitter->Emit("codes", device, QM_U8, (n + 1) / 2, &out->codes));
  QM_TRY(emitter->Emit("absmax", device, nested ? QM_U8 : QM_F32, p.Blocks(n), &out->absmax));
  QM_TRY(emitter->Emit("codebook", device, QM_F32, kCodebookSize, &out->codebook));
  QM_TRY(FillConstant(call, CodebookOf(p.fp4), kCodebookSize, out->codebook));
  if (!nested) return QM_OK;
  QM_TRY(emitter->Emit("nested_absmax", device, QM_F32, p.NestedBlocks(n), &out->nested_absmax));
  QM_TRY(
      emitter->Emit("nested_codebook", device, QM_F32, kByteCodebookSize, &out->nested_codebook));
  QM_TRY(emitter->Emit("absmax_offset", device, QM_F32, 1, &out->absmax_offset));
  return FillConstant(call, ByteCodebook(), kByteCodebookSize, out->nested_codebook);
}

// torch.linspace(0.1, 1, n + 1), in f32 from both ends as torch computes it.
float Boundary(int k, int n) {
  const float step = (1.0f - 0.1f) / static_cast<float>(n);
  const float at = static_cast<float>(k);
  return k < (n + 1) / 2 ? std::fma(step, at, 0.1f)
                         : std::fma(-step, static_cast<float>(n) - at, 1.0f);
}

// functional.py, create_dynamic_map(signed=True): per decade i the midpoints of 2^i parts of
// [0.1, 1], of both signs; 0; and 1, but not -1.
std::array<float, kByteCodebookSize> MakeByteCodebook() {
  constexpr double kDecades[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
  std::array<float, kByteCodebookSize> values = {};
  size_t count = 0;
  for (int i = 0; i < 7; ++i) {
    const int n = 1 << i;
    for (int k = 0; k < n; ++k) {
      const float middle = (Boundary(k, n) + Boundary(k + 1, n)) / 2.0f;
      const float value = static_cast<float>(kDecades[i]) * middle;
      values[count++] = value;
      values[count++] = -value;
    }
  }
  values[count++] = 0.0f;
  values[count++] = 1.0f;
  std::sort(values.begin(), values.end());
  return values;
}

struct Method {
  static qm_status Plan(qm_call* call, const qm_linear_info& info, qm_quant_plan* out) {
    Params params;
    QM_TRY(ReadOptions(call, info, &params));
    const int64_t n = info.out_features * info.in_features;
    constexpr uint64_t kDescription = 4096;  // names and parameters of the result
    uint64_t scratch = kDescription;
    if (call->device.kind == QM_CPU) scratch += CpuScratchBytes(params, n);
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) scratch += CudaScratchBytes(params, n);
#endif
    qm::FillPlan(out, kFormatId, scratch, 20.0 * static_cast<double>(n));
    return qm::PlanFormat(call, kFormatId, ParamsJson(params), BitsPerWeight(params, n), out);
  }

  static qm_status Run(qm_call* call, const qm_linear_info& info, const qm_tensor& weight,
                       const qm_stats*, qm_packed* out) {
    Params params;
    QM_TRY(ReadOptions(call, info, &params));
    qm::TensorView<const float> view;
    QM_TRY(qm::ViewMatrix<float>(call, weight, "the weight", call->device, info.out_features,
                                 info.in_features, &view));
    Emitter emitter(call);
    Result result;
    QM_TRY(EmitResult(call, params, info.out_features * info.in_features, &emitter, &result));
    QM_TRY(Quantize(call, params, view, result));
    return emitter.FinishPacked(params, info.out_features, info.in_features, out);
  }

 private:
  static qm_status Quantize(qm_call* call, const Params& params, qm::TensorView<const float> weight,
                            const Result& result) {
    if (call->device.kind == QM_CPU) return QuantizeCpu(call, params, weight, result);
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) return QuantizeCuda(call, params, weight, result);
#endif
    return qm::Fail(call, QM_FAILED_PRECONDITION,
                    "this build of nf4 has no CUDA kernels; use device cpu");
  }
};

constexpr qm_quantize_linear kTable = qm::QuantizeLinearTable<Method>::Make();

}  // namespace

const float* CodebookOf(bool fp4) { return fp4 ? kFp4Codebook : kNf4Codebook; }

const float* ByteCodebook() {
  static const std::array<float, kByteCodebookSize> values = MakeByteCodebook();
  return values.data();
}

const qm_quantize_linear* QuantizeLinearTable() { return &kTable; }

}  // namespace quantmill::nf4
