// gptq: rounding that makes up for each column's error in the columns not yet rounded.
#include "quantmill/sdk/plugin.hpp"

#include <algorithm>
#include <iterator>

#include "gptq.h"

namespace quantmill::gptq {
namespace {

constexpr qm_option kOptions[] = {
    qm::kAffineBitsOption,
    qm::kAffineGroupSizeOption,
    qm::kAffineSymmetricOption,
    {"damp", "0.01", "0.0..1.0",
     "Added to the Hessian's diagonal, as a part of its mean; raised where needed.", QM_OPT_F64, 0},
    {"block_size", "128", "1..256", "Columns solved together before the rest is updated.",
     QM_OPT_I64, 0},
    {"act_order", "false", nullptr,
     "Solve columns by falling Hessian diagonal; groups are runs in that order.", QM_OPT_BOOL, 0},
    {"static_groups", "false", nullptr,
     "Take scales from contiguous groups of the original weights, before solving.", QM_OPT_BOOL, 0},
    {"sequential", "false", nullptr,
     "True-sequential: the host measures inputs again after each group of linears in a block.",
     QM_OPT_BOOL, 0},
    {"clip_search", "false", nullptr,
     "Search each group's range, among 80 smaller ones, for the least error as the solver weighs "
     "it.",
     QM_OPT_BOOL, 0},
    {"asymmetric_error", "0.0", "0.0..1.0",
     "GPTAQ's alpha: how much of the input error of earlier layers to make up for; 0.25 is the "
     "published value, 0 is plain GPTQ.",
     QM_OPT_F64, 0},
    {"inputs", "run", "run|quantized|original",
     "Inputs of a block in calibration, acted on by the host: of the model as quantized so far or "
     "of the original; run = as run.inputs says.",
     QM_OPT_ENUM, 0},
};

constexpr qm_stat_request kStats[] = {{QM_STAT_HESSIAN, 0, QM_F32, 0},
                                      {QM_STAT_CROSS, 0, QM_F32, 0}};

qm_status ReadOptions(qm_call* call, const qm_linear_info& info, Options* out) {
  QM_TRY(qm::ReadAffineShape(call, info, &out->shape));
  out->damp = qm::OptionF64(call, "damp");
  out->block_size = qm::OptionI64(call, "block_size");
  out->act_order = qm::OptionBool(call, "act_order");
  out->static_groups = qm::OptionBool(call, "static_groups");
  out->asymmetric_error = qm::OptionF64(call, "asymmetric_error");
  if (qm::OptionBool(call, "clip_search")) out->search.clip = qm::AffineClip::kSquaredError;
  if (!(out->damp >= 0.0 && out->damp <= 1.0)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "damp ", out->damp, " is outside 0 .. 1");
  }
  if (out->block_size < 1 || out->block_size > kMaxBlockSize) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "block_size ", out->block_size, " is outside 1 .. ",
                    kMaxBlockSize);
  }
  if (!(out->asymmetric_error >= 0.0 && out->asymmetric_error <= 1.0)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "asymmetric_error ", out->asymmetric_error,
                    " is outside 0 .. 1");
  }
  return QM_OK;
}

qm_status MakeKernels(qm_call* call, std::unique_ptr<Kernels>* out) {
  if (call->device.kind == QM_CPU) {
    *out = MakeCpuKernels(call);
    return QM_OK;
  }
#if defined(QM_HAVE_CUDA)
  if (call->device.kind == QM_CUDA) {
    *out = MakeCudaKernels(call);
    return QM_OK;
  }
#endif
  return qm::Fail(call, QM_FAILED_PRECONDITION,
                  "this build of gptq has no CUDA kernels; use device cpu");
}

const void* DataOf(const qm_stats* stats, const char* id) {
  const qm_tensor* tensor = qm::FindStat(stats, id);
  return tensor != nullptr ? tensor->data : nullptr;
}

// The factor for these statistics, made at their first use.
qm_status FindOrMakeFactor(qm_call* call, Kernels& kernels, const Options& options,
                           const qm_stats* stats, std::vector<std::unique_ptr<Factor>>* factors,
                           const Factor** out) {
  const void* hessian = DataOf(stats, QM_STAT_HESSIAN);
  const void* cross = options.asymmetric_error > 0.0 ? DataOf(stats, QM_STAT_CROSS) : nullptr;
  for (const std::unique_ptr<Factor>& factor : *factors) {
    if (hessian != nullptr && factor->hessian_data == hessian && factor->cross_data == cross) {
      *out = factor.get();
      return QM_OK;
    }
  }
  auto factor = std::make_unique<Factor>();
  QM_TRY(MakeFactor(call, kernels, options, stats, factor.get()));
  factor->hessian_data = hessian;
  factor->cross_data = cross;
  *out = factor.get();
  factors->push_back(std::move(factor));
  return QM_OK;
}

struct Gptq {
  static qm_status Plan(qm_call* call, const qm_linear_info& info, qm_quant_plan* out) {
    Options options;
    QM_TRY(ReadOptions(call, info, &options));
    constexpr uint64_t kDescription = 4096;  // names and parameters of the result
    const bool correct = options.asymmetric_error > 0.0;
    out->stats = kStats;
    out->stat_count = correct ? 2 : 1;
    out->scratch_bytes_shared = FactorBytes(options);
    out->scratch_bytes = out->scratch_bytes_shared + WorkspaceBytes(options) + kDescription;
    const double rows = static_cast<double>(info.out_features);
    const double n = static_cast<double>(info.in_features);
    out->flops = (correct ? 2.0 : 1.0) * rows * n * n + (correct ? 2.0 : 1.0) * n * n * n;
    return qm::PlanAffineInt(call, options.shape, options.needs_group_index(), out);
  }

  static qm_status Run(qm_call* call, const qm_linear_info& info, const qm_tensor& weight,
                       const qm_stats* stats, qm_packed* out) {
    const qm_linear_info* infos[] = {&info};
    const qm_stats* all_stats[] = {stats};
    return RunGroup(call, 1, infos, &weight, all_stats, out);
  }

  static qm_status RunGroup(qm_call* call, uint64_t count, const qm_linear_info* const* infos,
                            const qm_tensor* weights, const qm_stats* const* stats,
                            qm_packed* out) {
    std::unique_ptr<Kernels> kernels;
    QM_TRY(MakeKernels(call, &kernels));
    std::vector<Options> options(count);
    std::vector<qm::TensorView<const float>> views(count);
    int64_t max_weights = 0, max_rows = 0, max_cols = 0;
    for (uint64_t i = 0; i < count; ++i) {
      QM_TRY(ReadOptions(call, *infos[i], &options[i]));
      const int64_t rows = infos[i]->out_features, cols = infos[i]->in_features;
      QM_TRY(qm::ViewMatrix<float>(call, weights[i], "the weight", call->device, rows, cols,
                                   &views[i]));
      max_weights = std::max(max_weights, rows * cols);
      max_rows = std::max(max_rows, rows);
      max_cols = std::max(max_cols, cols);
    }
    if (count == 0) return QM_OK;
    Workspace workspace;
    QM_TRY(MakeWorkspace(call, options[0], max_weights, max_rows, max_cols, &workspace));
    std::vector<std::unique_ptr<Factor>> factors;
    for (uint64_t i = 0; i < count; ++i) {
      const Factor* factor = nullptr;
      QM_TRY(FindOrMakeFactor(call, *kernels, options[i], stats[i], &factors, &factor));
      qm::AffineTensors tensors;
      QM_TRY(
          qm::EmitAffineInt(call, i, options[i].shape, options[i].needs_group_index(), &tensors));
      const ProgressRange range = {static_cast<double>(i) / static_cast<double>(count),
                                   static_cast<double>(i + 1) / static_cast<double>(count)};
      QM_TRY(Solve(call, *kernels, options[i], *factor, views[i], workspace, range, tensors));
      QM_TRY(qm::DescribeAffineInt(call, options[i].shape, tensors, &out[i]));
    }
    return QM_OK;
  }
};

constexpr qm_quantize_linear kQuantizeLinear = qm::QuantizeLinearTable<Gptq>::Make();

const void* Ext(const qm_method*, const char* id) noexcept {
  return std::string_view(id) == QM_EXT_QUANTIZE_LINEAR ? &kQuantizeLinear : nullptr;
}

constexpr qm_method kMethod = {sizeof(qm_method),
                               "gptq",
                               "0.1.0",
                               "Second-order rounding with error compensation (GPTQ, GPTAQ)",
                               kOptions,
                               std::size(kOptions),
                               QM_METHOD_DETERMINISTIC,
                               &Ext};
constexpr const qm_method* kMethods[] = {&kMethod};
constexpr qm_plugin kPlugin = {sizeof(qm_plugin), QM_ABI_MAJOR, QM_ABI_MINOR,      0, 1, kMethods,
                               "quantmill",       "Apache-2.0", "C++ " __VERSION__};

}  // namespace
}  // namespace quantmill::gptq

QM_PLUGIN_ENTRY(quantmill::gptq::kPlugin)
