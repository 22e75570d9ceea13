// qm.block-transform/1 of awq, awq.scale and awq.clip: all sites are searched on the block as it
// is, then the limits on the weights as the scales leave them.
#include <algorithm>
#include <cstring>
#include <iterator>

#include "awq.h"
#include "quantmill/sdk/tables.hpp"

namespace quantmill::awq {
namespace {

// On full-precision inputs, as the published code measures (AutoAWQ runs every block on the
// outputs of unquantized ones).
constexpr qm_stat_request kHessianOnly[] = {{QM_STAT_HESSIAN, 0, QM_F32, QM_STAT_FROM_ORIGINAL}};
constexpr qm_stat_request kHessianAndMean[] = {{QM_STAT_HESSIAN, 0, QM_F32, QM_STAT_FROM_ORIGINAL},
                                               {QM_STAT_ABSMEAN, 0, QM_F32, QM_STAT_FROM_ORIGINAL}};

qm_status ReadScaleOptions(qm_call* call, SearchOptions* out) {
  out->duo_scaling = qm::OptionBool(call, "duo_scaling");
  out->windows = qm::OptionI64(call, "windows");
  const std::string_view loss = qm::OptionStr(call, "loss");
  if (loss != "module" && loss != "linear") {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "loss \"", loss,
                    "\" is not offered; use module or linear");
  }
  out->module_loss = loss == "module";
  if (out->windows >= 0) return QM_OK;
  return qm::Fail(call, QM_INVALID_ARGUMENT, "windows ", out->windows, " is negative");
}

qm_status ReadGrid(qm_call* call, SearchOptions* out) {
  const int64_t grid = qm::OptionI64(call, "grid");
  if (grid < 2 || grid > 1000) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "grid ", grid, " is outside 2 .. 1000");
  }
  out->grid = static_cast<int32_t>(grid);
  return QM_OK;
}

// A row-major F32 tensor of the host over scratch.
qm_tensor HostTensor(float* data, int64_t rows, int64_t columns, int32_t rank) {
  qm_tensor t = qm::MakeMatrix(data, rows, columns, columns, kHost);
  if (rank == 2) return t;
  t.rank = 1;
  t.shape[0] = columns;
  t.shape[1] = 1;
  t.stride[0] = 1;
  t.stride[1] = 0;
  return t;
}

// The options of awq.scale and awq.clip themselves; bits 0 = none.
qm_next_rounding OwnRounding(qm_call* call) {
  const auto bits = static_cast<int32_t>(qm::OptionI64(call, "bits"));
  if (bits == 0) return {0, 0, -1};
  return {bits, qm::OptionBool(call, "symmetric") ? 1 : 0, qm::OptionI64(call, "group_size")};
}

class Search {
 public:
  Search(qm_call* call, const Block& block, const SearchOptions& options)
      : call_(call),
        block_(block),
        options_(options),
        in_scales_(block.info().linear_count),
        row_scales_(block.info().linear_count) {}

  qm_status Run(const qm_stats* const* per_linear, const qm_edit** edits, uint64_t* count) {
    const int64_t most = static_cast<int64_t>(block_.sites().size() + block_.info().linear_count);
    QM_TRY(qm::Scratch(call_, kHost, most, "edits", &edits_));
    QM_TRY(ReadStats(call_, block_, per_linear, options_.scale, &stats_));
    QM_TRY(MakeWorkspace(call_, block_, options_, &workspace_));
    const double parts = static_cast<double>(most);
    double done = 0;
    for (const Site& site : block_.sites()) {
      QM_TRY(qm::Progress(call_, done++ / parts));
      if (options_.scale) QM_TRY(ScaleSite(site));
    }
    for (uint64_t i = 0; i < block_.info().linear_count; ++i) {
      QM_TRY(qm::Progress(call_, done++ / parts));
      if (options_.clip && block_.clipped(i)) QM_TRY(ClipLinear(i));
    }
    *edits = edits_;
    *count = count_;
    return QM_OK;
  }

 private:
  void Add(const char* target, qm_edit_kind kind, const qm_tensor& value) {
    edits_[count_++] = {target, value, kind, 0};
  }

  qm_status ScaleSite(const Site& site) {
    std::vector<float> scale;
    QM_TRY(SearchScale(call_, block_, site, stats_, options_, workspace_, &scale));
    if (scale.empty()) return QM_OK;
    float* value = nullptr;
    const int64_t channels = site.site->channels;
    QM_TRY(qm::Scratch(call_, kHost, channels, "scales", &value));
    std::copy(scale.begin(), scale.end(), value);
    Add(site.site->id, QM_EDIT_SCALE, HostTensor(value, 1, channels, 1));
    for (const Consumer& consumer : site.consumers) {
      in_scales_[consumer.linear] =
          ByInput(consumer, block_.linear(consumer.linear).in_features, scale);
    }
    if (site.producer >= 0) row_scales_[static_cast<size_t>(site.producer)] = std::move(scale);
    return QM_OK;
  }

  qm_status ClipLinear(uint64_t index) {
    const qm_linear_info& linear = block_.linear(index);
    const int64_t groups = linear.in_features / block_.roundings()[index].width;
    float* limits = nullptr;
    QM_TRY(qm::Scratch(call_, kHost, linear.out_features * groups, "limits", &limits));
    bool any = false;
    QM_TRY(SearchClip(call_, block_, index, stats_[index], options_, in_scales_[index],
                      row_scales_[index], workspace_, limits, &any));
    if (any) Add(linear.name, QM_EDIT_CLIP, HostTensor(limits, linear.out_features, groups, 2));
    return QM_OK;
  }

  qm_call* call_;
  const Block& block_;
  const SearchOptions& options_;
  Workspace workspace_;
  std::vector<InputStats> stats_;
  std::vector<std::vector<float>> in_scales_, row_scales_;  // per linear; empty = none
  qm_edit* edits_ = nullptr;
  uint64_t count_ = 0;
};

uint64_t PlanBytes(const Block& block, const SearchOptions& options) {
  uint64_t bytes = PlanWorkspace(block, options) + 4096;
  bytes += (block.sites().size() + block.info().linear_count) * sizeof(qm_edit);
  for (const Site& site : block.sites()) {
    if (options.scale) bytes += static_cast<uint64_t>(site.site->channels) * sizeof(float) + 256;
  }
  for (uint64_t i = 0; i < block.info().linear_count; ++i) {
    const Rounding& rounding = block.roundings()[i];
    if (!rounding.active()) continue;
    const qm_linear_info& linear = block.linear(i);
    const int64_t groups = linear.in_features / rounding.width;
    bytes += static_cast<uint64_t>(linear.out_features * groups) * sizeof(float) + 256;
#if defined(QM_HAVE_CUDA)
    if (options.duo_scaling) {
      bytes += RelativeScratchBytes(linear.out_features, linear.in_features, rounding.width);
    }
#endif
  }
  return bytes;
}

qm_status NothingToDo(qm_call* call, const Block& block, const char* what) {
  return qm::Fail(call, QM_INVALID_ARGUMENT, "no linear of ", block.info().name, what);
}

qm_status CheckWork(qm_call* call, const Block& block, const SearchOptions& options) {
  bool rounded = false, clipped = false;
  for (uint64_t i = 0; i < block.info().linear_count; ++i) {
    rounded = rounded || block.roundings()[i].active();
    clipped = clipped || block.clipped(i);
  }
  if (!rounded) {
    return NothingToDo(call, block,
                       " is rounded to integers by a later stage; add one with the option bits, "
                       "such as gptq, or say what to prepare for with this stage's own options "
                       "(bits: 4, group_size: 64, symmetric: true before nf4)");
  }
  if (options.scale && !options.clip && block.sites().empty()) {
    return NothingToDo(call, block,
                       " can be rescaled: a scale needs all readers of a channel; let the stage's "
                       "layers name all of q, k and v (or gate and up) together");
  }
  if (options.clip && !options.scale && !clipped) {
    return NothingToDo(call, block, " may be clipped: queries and keys are left alone");
  }
  return QM_OK;
}

// A rounding, a product with the Hessian and a sum for every candidate.
double Flops(const Block& block, const SearchOptions& options) {
  double flops = 0;
  for (uint64_t i = 0; i < block.info().linear_count; ++i) {
    const qm_linear_info& linear = block.linear(i);
    const double weights =
        static_cast<double>(linear.out_features) * static_cast<double>(linear.in_features);
    if (options.scale) {
      flops += 2.0 * options.grid * weights * static_cast<double>(linear.in_features);
    }
    if (options.clip) {
      flops +=
          2.0 * options.clip_steps() * weights * static_cast<double>(block.roundings()[i].width);
    }
  }
  return flops;
}

// What: bit 0 scales, bit 1 clipping.
template <bool kScale, bool kClip>
struct Transform {
  static qm_status Read(qm_call* call, const qm_block_info& info, Block* block,
                        SearchOptions* options) {
    QM_TRY(ReadGrid(call, options));
    if (kScale) QM_TRY(ReadScaleOptions(call, options));
    options->scale = kScale;
    options->clip = kClip && (!kScale || qm::OptionBool(call, "clip"));
    // awq as a whole packs, so that its own bits are the next rounding already.
    const bool whole = kScale && kClip;
    const qm_next_rounding otherwise = whole ? qm_next_rounding{0, 0, -1} : OwnRounding(call);
    QM_TRY(Block::Read(call, info, otherwise, block));
    return CheckWork(call, *block, *options);
  }

  static qm_status Plan(qm_call* call, const qm_block_info& info, qm_quant_plan* out) {
    Block block;
    SearchOptions options;
    QM_TRY(Read(call, info, &block, &options));
    out->stats = kScale ? kHessianAndMean : kHessianOnly;
    out->stat_count = kScale ? std::size(kHessianAndMean) : std::size(kHessianOnly);
    out->scratch_bytes = PlanBytes(block, options);
    out->flops = Flops(block, options);
    return QM_OK;
  }

  static qm_status Run(qm_call* call, const qm_block_info& info, const qm_stats* const* per_linear,
                       const qm_edit** edits, uint64_t* count) {
    Block block;
    SearchOptions options;
    QM_TRY(Read(call, info, &block, &options));
    return Search(call, block, options).Run(per_linear, edits, count);
  }
};

}  // namespace

constexpr qm_block_transform kTransformTable =
    qm::BlockTransformTable<Transform<true, true>>::Make();
constexpr qm_block_transform kScaleTransformTable =
    qm::BlockTransformTable<Transform<true, false>>::Make();
constexpr qm_block_transform kClipTransformTable =
    qm::BlockTransformTable<Transform<false, true>>::Make();

}  // namespace quantmill::awq
