// ptq.smooth on every norm that feeds linears alone: two sites of a decoder layer, one where the
// MLP is a mixture of experts (its router reads the same norm, and its experts see few rows).
#include "smooth.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <string_view>
#include <vector>

#include "quantmill/sdk/plugin.hpp"
#include "quantmill/sdk/tables.hpp"
#if defined(QM_HAVE_CUDA)
#include "quantmill/sdk/cuda.hpp"
#endif

namespace quantmill::ptq {
namespace {

constexpr double kLeast = 1e-5;
constexpr int64_t kColumnsPerTask = 256;
constexpr qm_device kHost = {QM_CPU, 0};

constexpr qm_option kSmoothOptions[] = {
    {"alpha", "0.5", "0.0..1.0",
     "How much of the activations' range goes to the weights: 0 = none but the weights' own "
     "spread is evened out, 1 = all.",
     QM_OPT_F64, 0},
};

constexpr qm_stat_request kStats[] = {{QM_STAT_ABSMAX, 0, QM_F32, 0}};

bool IsLinear(const qm_block_info& block, const char* name, uint64_t* index) {
  for (uint64_t i = 0; i < block.linear_count; ++i) {
    if (std::strcmp(block.linears[i]->name, name) != 0) continue;
    *index = i;
    return true;
  }
  return false;
}

// A norm whose consumers are all linears of the stage.
bool IsSmoothed(const qm_block_info& block, const qm_scale_site& site) {
  uint64_t index = 0;
  if (IsLinear(block, site.producer, &index)) return false;
  return std::all_of(
      site.consumers, site.consumers + site.consumer_count, [&](const qm_site_consumer& consumer) {
        return (consumer.flags & QM_CONSUMER_NOT_A_SLOT) == 0 && consumer.channel_map == nullptr &&
               IsLinear(block, consumer.name, &index);
      });
}

// Copies `count` floats from the call's device to the host.
qm_status ToHost(qm_call* call, const void* from, int64_t count, std::vector<float>* out) {
  out->resize(static_cast<size_t>(count));
  const size_t bytes = static_cast<size_t>(count) * sizeof(float);
#if defined(QM_HAVE_CUDA)
  if (call->device.kind == QM_CUDA) {
    const cudaStream_t stream = qm::Stream(call);
    QM_CUDA(call, cudaMemcpyAsync(out->data(), from, bytes, cudaMemcpyDeviceToHost, stream));
    QM_CUDA(call, cudaStreamSynchronize(stream));
    return QM_OK;
  }
#endif
  if (call->device.kind != QM_CPU) {
    return qm::Fail(call, QM_FAILED_PRECONDITION,
                    "this build of ptq has no CUDA kernels; use device cpu");
  }
  std::memcpy(out->data(), from, bytes);
  return QM_OK;
}

// Largest |weight| of each input channel over the site's consumers.
qm_status WeightMaxima(qm_call* call, const qm_block_info& block, const qm_scale_site& site,
                       std::vector<float>* out) {
  float* maximum = nullptr;
  QM_TRY(qm::Scratch(call, call->device, site.channels, "channel maxima", &maximum));
#if defined(QM_HAVE_CUDA)
  if (call->device.kind == QM_CUDA) {
    const size_t bytes = static_cast<size_t>(site.channels) * sizeof(float);
    QM_CUDA(call, cudaMemsetAsync(maximum, 0, bytes, qm::Stream(call)));
  }
#endif
  if (call->device.kind == QM_CPU) std::fill_n(maximum, site.channels, 0.0f);
  for (uint64_t c = 0; c < site.consumer_count; ++c) {
    uint64_t index = 0;
    IsLinear(block, site.consumers[c].name, &index);
    const qm_tensor& weight = block.weights[index];
    if (call->device.kind == QM_CPU) QM_TRY(ColumnMaximumCpu(call, weight, maximum));
#if defined(QM_HAVE_CUDA)
    if (call->device.kind == QM_CUDA) QM_TRY(ColumnMaximumCuda(call, weight, maximum));
#endif
  }
  return ToHost(call, maximum, site.channels, out);
}

qm_status SmoothSite(qm_call* call, const qm_block_info& block, const qm_scale_site& site,
                     const qm_stats& stats, double alpha, qm_edit* edit) {
  const qm_tensor* absmax = qm::FindStat(&stats, QM_STAT_ABSMAX);
  if (absmax == nullptr || absmax->shape[0] != site.channels) {
    return qm::Fail(call, QM_FAILED_PRECONDITION, "no absmax of the inputs of ",
                    site.consumers[0].name, "; give the pipeline a calibration text");
  }
  std::vector<float> activations, weights;
  QM_TRY(ToHost(call, absmax->data, site.channels, &activations));
  QM_TRY(WeightMaxima(call, block, site, &weights));
  float* scale = nullptr;
  QM_TRY(qm::Scratch(call, kHost, site.channels, "scales", &scale));
  for (size_t j = 0; j < activations.size(); ++j) {
    scale[j] = SmoothScale(activations[j], weights[j], alpha);
  }
  *edit = {};
  edit->target = site.id;
  edit->kind = QM_EDIT_SCALE;
  edit->value = qm::MakeMatrix(scale, 1, site.channels, site.channels, kHost);
  edit->value.rank = 1;
  edit->value.shape[0] = site.channels;
  edit->value.shape[1] = 1;
  edit->value.stride[0] = 1;
  edit->value.stride[1] = 0;
  return QM_OK;
}

struct Smooth {
  static qm_status Plan(qm_call* call, const qm_block_info& block, qm_quant_plan* out) {
    const double alpha = qm::OptionF64(call, "alpha");
    if (!(alpha >= 0.0 && alpha <= 1.0)) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "alpha ", alpha, " is outside 0 .. 1");
    }
    uint64_t sites = 0;
    out->scratch_bytes = 0;
    for (uint64_t s = 0; s < block.site_count; ++s) {
      if (!IsSmoothed(block, block.sites[s])) continue;
      ++sites;
      // Scales on the host, channel maxima on the device.
      out->scratch_bytes += 2 * sizeof(float) * static_cast<uint64_t>(block.sites[s].channels);
    }
    if (sites == 0) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "no norm of ", block.name,
                      " feeds only linears of this stage; let its layers name all of q, k and v "
                      "(or gate and up) together");
    }
    out->scratch_bytes += sites * sizeof(qm_edit);
    out->stats = kStats;
    out->stat_count = std::size(kStats);
    for (uint64_t i = 0; i < block.linear_count; ++i) {
      out->flops += static_cast<double>(block.linears[i]->out_features) *
                    static_cast<double>(block.linears[i]->in_features);
    }
    return QM_OK;
  }

  static qm_status Run(qm_call* call, const qm_block_info& block, const qm_stats* const* per_linear,
                       const qm_edit** edits, uint64_t* edit_count) {
    const double alpha = qm::OptionF64(call, "alpha");
    qm_edit* list = nullptr;
    QM_TRY(qm::Scratch(call, kHost, static_cast<int64_t>(block.site_count), "edits", &list));
    uint64_t count = 0;
    for (uint64_t s = 0; s < block.site_count; ++s) {
      const qm_scale_site& site = block.sites[s];
      if (!IsSmoothed(block, site)) continue;
      QM_TRY(qm::Progress(call, static_cast<double>(s) / static_cast<double>(block.site_count)));
      uint64_t first = 0;
      IsLinear(block, site.consumers[0].name, &first);
      QM_TRY(SmoothSite(call, block, site, *per_linear[first], alpha, &list[count++]));
    }
    *edits = list;
    *edit_count = count;
    return QM_OK;
  }
};

constexpr qm_block_transform kTransform = qm::BlockTransformTable<Smooth>::Make();

const void* SmoothExt(const qm_method*, const char* id) noexcept {
  return std::string_view(id) == QM_EXT_BLOCK_TRANSFORM ? &kTransform : nullptr;
}

}  // namespace

float SmoothScale(float activation, float weight, double alpha) {
  if (!(activation > 0)) return 1.0f;
  const double scale = std::pow(static_cast<double>(activation), alpha) /
                       std::pow(std::max(kLeast, static_cast<double>(weight)), 1.0 - alpha);
  return static_cast<float>(std::max(kLeast, scale));
}

qm_status ColumnMaximumCpu(qm_call* call, qm_tensor weight, float* maximum) {
  const qm::TensorView<const float> view(weight);
  return qm::ParallelFor(call, weight.shape[1], kColumnsPerTask,
                         [&](int64_t begin, int64_t end, int32_t) {
                           for (int64_t row = 0; row < weight.shape[0]; ++row) {
                             const float* values = view.row(row);
                             for (int64_t j = begin; j < end; ++j) {
                               maximum[j] = std::max(maximum[j], std::abs(values[j]));
                             }
                           }
                           return QM_OK;
                         });
}

constexpr qm_method kSmoothMethod = {
    sizeof(qm_method),
    "ptq.smooth",
    "0.1.0",
    "Move activation outliers behind norms into the weights (SmoothQuant), for any quantizer after",
    kSmoothOptions,
    std::size(kSmoothOptions),
    QM_METHOD_DETERMINISTIC,
    &SmoothExt};

}  // namespace quantmill::ptq
