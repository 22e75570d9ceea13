// What the host says about a block, sorted out for the searches; working memory.
#include <algorithm>
#include <cstring>

#include "awq.h"

namespace quantmill::awq {
namespace {

// Floats of a chunk of rows that is rounded and multiplied at once: 64 MiB.
constexpr int64_t kChunkFloats = int64_t{1} << 24;

uint64_t Padded(uint64_t bytes) { return (bytes + 255) / 256 * 256; }

uint64_t FloatBytes(int64_t count) { return Padded(static_cast<uint64_t>(count) * sizeof(float)); }

qm_status ReadRounding(qm_call* call, const qm_linear_info& linear, const qm_next_rounding& next,
                       Rounding* out) {
  out->rule.bits = next.bits;
  out->rule.symmetric = next.symmetric != 0;
  out->rule.scale_dtype = linear.scale_dtype;
  out->width = next.group_size <= 0 ? linear.in_features : next.group_size;
  if (next.bits < 0 || next.bits > 8) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, linear.name, " is to be rounded to ", next.bits,
                    " bits; up to 8 can be prepared for");
  }
  if (linear.in_features % out->width != 0) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "group_size ", next.group_size,
                    " of the next rounding does not divide the ", linear.in_features, " inputs of ",
                    linear.name, "; use ", qm::ValidGroupSizes(linear.in_features));
  }
  return QM_OK;
}

bool IsAttention(const qm_linear_info& linear) {
  return std::strncmp(linear.role, "attn.", 5) == 0;
}

// Elements of the largest buffers.
struct Sizes {
  int64_t rounded = 0, scale = 0, delta = 0, sums = 0, maximum = 0;

  Sizes(const Block& block, const SearchOptions& options) {
    for (uint64_t i = 0; i < block.info().linear_count; ++i) {
      const Rounding& rounding = block.roundings()[i];
      if (!rounding.active()) continue;
      const int64_t columns = block.linear(i).in_features, rows = block.linear(i).out_features;
      const int64_t groups = columns / rounding.width;
      scale = std::max(scale, columns);
      if (options.scale) Grow(rows, columns, 1, 1);
      if (options.clip && block.clipped(i)) Grow(rows, columns, options.clip_steps(), groups);
    }
    for (const Site& site : block.sites()) {
      if (!options.scale || !options.module_loss || site.module[0] == '\0') continue;
      int64_t floats = 0;
      for (const Consumer& consumer : site.consumers) {
        const qm_linear_info& linear = block.linear(consumer.linear);
        floats += linear.out_features * linear.in_features;
      }
      rounded = std::max(rounded, floats);
    }
  }

 private:
  void Grow(int64_t rows, int64_t columns, int64_t copies, int64_t groups) {
    const int64_t chunk = ChunkRows(rows, columns * copies);
    delta = std::max(delta, chunk * columns * copies);
    sums = std::max(sums, chunk * copies * groups);
    maximum = std::max(maximum, chunk * groups);
  }
};

}  // namespace

int64_t ChunkRows(int64_t rows, int64_t floats_per_row) {
  return std::clamp<int64_t>(kChunkFloats / floats_per_row, 1, rows);
}

Rows Block::rows(uint64_t index) const {
  const qm_tensor& weight = info_->weights[index];
  return {static_cast<const float*>(weight.data), weight.shape[0], weight.shape[1],
          weight.stride[0]};
}

bool Block::clipped(uint64_t index) const {
  const std::string_view role = info_->linears[index]->role;
  return roundings_[index].active() && role != "attn.q" && role != "attn.k";
}

int64_t Block::Find(std::string_view name) const {
  for (uint64_t i = 0; i < info_->linear_count; ++i) {
    if (name == info_->linears[i]->name) return static_cast<int64_t>(i);
  }
  return -1;
}

qm_status Block::Read(qm_call* call, const qm_block_info& info, const qm_next_rounding& otherwise,
                      Block* out) {
  out->info_ = &info;
  out->roundings_.resize(info.linear_count);
  for (uint64_t i = 0; i < info.linear_count; ++i) {
    const qm_next_rounding& next =
        info.next_roundings[i].bits != 0 ? info.next_roundings[i] : otherwise;
    QM_TRY(ReadRounding(call, *info.linears[i], next, &out->roundings_[i]));
  }
  for (uint64_t s = 0; s < info.site_count; ++s) {
    Site site;
    site.site = &info.sites[s];
    site.producer = out->Find(info.sites[s].producer);
    for (uint64_t c = 0; c < info.sites[s].consumer_count; ++c) {
      const qm_site_consumer& consumer = info.sites[s].consumers[c];
      const int64_t index = out->Find(consumer.name);
      if (index < 0 || !out->roundings_[static_cast<size_t>(index)].active()) continue;
      site.consumers.push_back({static_cast<uint64_t>(index), consumer.channel_map});
    }
    if (site.consumers.empty()) continue;
    if (info.sites[s].consumer_count > 1) {
      site.module = IsAttention(out->linear(site.consumers[0].linear)) ? "self_attn" : "mlp";
    }
    out->sites_.push_back(std::move(site));
  }
  return QM_OK;
}

qm_status ReadStats(qm_call* call, const Block& block, const qm_stats* const* per_linear,
                    bool need_absmean, std::vector<InputStats>* out) {
  out->resize(block.info().linear_count);
  for (uint64_t i = 0; i < block.info().linear_count; ++i) {
    InputStats& stats = (*out)[i];
    const qm_tensor* hessian = qm::FindStat(per_linear[i], QM_STAT_HESSIAN);
    const qm_tensor* absmean = qm::FindStat(per_linear[i], QM_STAT_ABSMEAN);
    const int64_t in = block.linear(i).in_features;
    const bool complete = hessian != nullptr && hessian->shape[0] == in &&
                          (!need_absmean || (absmean != nullptr && absmean->shape[0] == in));
    if (!complete) {
      return qm::Fail(call, QM_FAILED_PRECONDITION, "no statistics of the inputs of ",
                      block.linear(i).name, "; give the pipeline a calibration text");
    }
    stats.hessian = *hessian;
    if (need_absmean) stats.absmean = static_cast<const float*>(absmean->data);
    stats.rows = per_linear[i]->row_count;
  }
  return QM_OK;
}

uint64_t PlanWorkspace(const Block& block, const SearchOptions& options) {
  const Sizes sizes(block, options);
  return FloatBytes(sizes.rounded) + FloatBytes(sizes.scale) + 2 * FloatBytes(sizes.delta) +
         FloatBytes(sizes.sums) + FloatBytes(sizes.maximum);
}

qm_status MakeWorkspace(qm_call* call, const Block& block, const SearchOptions& options,
                        Workspace* out) {
  const Sizes sizes(block, options);
  const qm_device device = call->device;
  QM_TRY(qm::Scratch(call, device, sizes.rounded, "rounded weights", &out->rounded));
  QM_TRY(qm::Scratch(call, device, sizes.scale, "scales", &out->scale));
  QM_TRY(qm::Scratch(call, device, sizes.delta, "rounding errors", &out->delta));
  QM_TRY(qm::Scratch(call, device, sizes.delta, "rounding errors", &out->product));
  QM_TRY(qm::Scratch(call, device, sizes.sums, "sums", &out->sums));
  return qm::Scratch(call, device, sizes.maximum, "group maxima", &out->maximum);
}

std::vector<float> ByInput(const Consumer& consumer, int64_t in_features,
                           const std::vector<float>& by_channel) {
  if (consumer.channel_map == nullptr) return by_channel;
  std::vector<float> values(static_cast<size_t>(in_features));
  for (int64_t i = 0; i < in_features; ++i) {
    values[static_cast<size_t>(i)] = by_channel[static_cast<size_t>(consumer.channel_map[i])];
  }
  return values;
}

}  // namespace quantmill::awq
