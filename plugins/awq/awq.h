// Activation-aware weight quantization: scales per input channel, clipping of weights, rounding.
// Sources of the formulas: mit-han-lab/llm-awq awq/quantize/, casper-hansen/AutoAWQ awq/quantize/,
// arXiv 2306.00978; deviations are listed in README.md.
#ifndef QUANTMILL_PLUGINS_AWQ_AWQ_H_
#define QUANTMILL_PLUGINS_AWQ_AWQ_H_

#include <cstdint>
#include <string_view>
#include <vector>

#include "quantmill/block_transform.h"
#include "quantmill/sdk/affine_int.hpp"
#include "quantmill/sdk/plugin.hpp"
#include "quantmill/sdk/tensor.hpp"

namespace quantmill::awq {

inline constexpr qm_device kHost = {QM_CPU, 0};

// ---- what the searches are asked for -----------------------------------------------------------
struct SearchOptions {
  int32_t grid = 20;        // candidates of a scale; steps of a full shrink of a range
  bool duo_scaling = true;  // scales follow the weights, too
  bool module_loss = true;  // of q, k, v and gate, up: on the outputs of their module
  int64_t windows = 0;      // of calibration text for the module's loss; 0 = all
  bool scale = true;        // propose scales
  bool clip = true;         // propose clipping

  // Ranges tried when clipping: down to half (AutoAWQ: n_grid 20, max_shrink 0.5).
  int32_t clip_steps() const { return grid < 2 ? 1 : grid / 2; }
};

// How one linear will be rounded.
struct Rounding {
  qm::AffineRule rule;  // bits 0: it stays dense
  int64_t width = 0;    // inputs that share a scale

  bool active() const { return rule.bits > 0; }
};

// ---- operations on rows of a weight (awq_ref.cc, awq.cu: the same bits) -------------------------
// f32 rows on the call's device; elements of a row are neighbours.
struct Rows {
  const float* data;
  int64_t count;
  int64_t columns;
  int64_t stride;

  Rows Slice(int64_t first, int64_t rows) const {
    return {data + first * stride, rows, columns, stride};
  }
};

// Sums over rows are made of parts of this many, so that CPU and GPU add alike.
inline constexpr int64_t kRowsPerSum = 64;
// Lanes of the sum over a row.
inline constexpr int kLanes = 32;

// out[r, i] = Q(w[r, i] s[i]) / s[i], minus w[r, i] if `difference`; scale null: s = 1. out is
// contiguous.
qm_status FakeQuantCpu(qm_call* call, const Rows& w, const float* scale, const Rounding& rounding,
                       bool difference, float* out);
qm_status FakeQuantCuda(qm_call* call, const Rows& w, const float* scale, const Rounding& rounding,
                        bool difference, float* out);

// For each group g, row r and step t: v = w s, m = max |v| over the group,
//   delta[g, r, t, i] = (Q(clamp(v, -m (1 - t/grid), m (1 - t/grid))) - v) / s
// delta: [groups, rows, steps, width]; maximum: [rows, groups] of m.
struct ClipGrid {
  int32_t grid, steps;
  QM_HD float factor(int32_t step) const {
    return 1.0f - static_cast<float>(step) / static_cast<float>(grid);
  }
};
qm_status ClipDeltasCpu(qm_call* call, const Rows& w, const float* scale, const Rounding& rounding,
                        const ClipGrid& grid, float* delta, float* maximum);
qm_status ClipDeltasCuda(qm_call* call, const Rows& w, const float* scale, const Rounding& rounding,
                         const ClipGrid& grid, float* delta, float* maximum);

// sums[r] = sum over i of a[r, i] b[r, i]; both contiguous. Element i is added in lane i % 32.
qm_status RowDotsCpu(qm_call* call, const float* a, const float* b, int64_t rows, int64_t columns,
                     float* sums);
qm_status RowDotsCuda(qm_call* call, const float* a, const float* b, int64_t rows, int64_t columns,
                      float* sums);

// sums[i] += sum over rows of |w[r, i]| / (max |w| over the group of (r, i) + 1e-6); sums on the
// host.
qm_status AddRelativeCpu(qm_call* call, const Rows& w, int64_t width, std::vector<double>* sums);
qm_status AddRelativeCuda(qm_call* call, const Rows& w, int64_t width, std::vector<double>* sums);
// Scratch on the device that AddRelativeCuda takes.
uint64_t RelativeScratchBytes(int64_t rows, int64_t columns, int64_t width);

// Round to nearest into the tensors of the format.
qm_status RoundCpu(qm_call* call, const qm::AffineShape& shape, qm::TensorView<const float> weight,
                   const qm::AffineTensors& out);
qm_status RoundCuda(qm_call* call, const qm::AffineShape& shape, qm::TensorView<const float> weight,
                    const qm::AffineTensors& out);
uint64_t RoundScratchBytes(const qm::AffineShape& shape);

// ---- the device at hand (device.cc) ------------------------------------------------------------
qm_status FakeQuant(qm_call* call, const Rows& w, const float* scale, const Rounding& rounding,
                    bool difference, float* out);
qm_status ClipDeltas(qm_call* call, const Rows& w, const float* scale, const Rounding& rounding,
                     const ClipGrid& grid, float* delta, float* maximum);
qm_status RowDots(qm_call* call, const float* a, const float* b, int64_t rows, int64_t columns,
                  float* sums);
qm_status AddRelative(qm_call* call, const Rows& w, int64_t width, std::vector<double>* sums);
// Copies between the call's device and the host; both have finished with the host's side on return.
qm_status ToHost(qm_call* call, const float* from, int64_t count, float* to);
qm_status ToDevice(qm_call* call, const float* from, int64_t count, float* to);

// ---- a block -----------------------------------------------------------------------------------
// A consumer of a site that will be rounded.
struct Consumer {
  uint64_t linear = 0;                   // index in qm_block_info::linears
  const int32_t* channel_map = nullptr;  // null: input i is channel i
};

// A site with at least one linear to be rounded behind it.
struct Site {
  const qm_scale_site* site = nullptr;
  std::vector<Consumer> consumers;
  // "self_attn" or "mlp"; "" where the site has one consumer, whose Hessian tells the loss.
  const char* module = "";
  int64_t producer = -1;  // index of the linear that feeds the channels; -1 = a norm
};

// A block as the searches see it, sorted out from what the host says.
class Block {
 public:
  // INVALID_ARGUMENT where a group size does not divide.
  static qm_status Read(qm_call* call, const qm_block_info& info, const qm_next_rounding& otherwise,
                        Block* out);

  const qm_block_info& info() const { return *info_; }
  const std::vector<Rounding>& roundings() const { return roundings_; }
  const std::vector<Site>& sites() const { return sites_; }
  const qm_linear_info& linear(uint64_t index) const { return *info_->linears[index]; }
  Rows rows(uint64_t index) const;
  // Whether clipping may be proposed: to be rounded, and neither queries nor keys, whose products
  // clipping harms (AutoAWQ skips them).
  bool clipped(uint64_t index) const;

 private:
  int64_t Find(std::string_view name) const;

  const qm_block_info* info_ = nullptr;
  std::vector<Rounding> roundings_;
  std::vector<Site> sites_;
};

// Statistics of one linear.
struct InputStats {
  const float* absmean = nullptr;  // [in] on the device; null where not asked for
  qm_tensor hessian = {};          // [in, in]
  int64_t rows = 0;
};
qm_status ReadStats(qm_call* call, const Block& block, const qm_stats* const* per_linear,
                    bool need_absmean, std::vector<InputStats>* out);

// Working memory, made once per call; bytes as PlanWorkspace counts them.
struct Workspace {
  float* rounded = nullptr;  // the linears of a module, rounded
  float* scale = nullptr;    // [most inputs]
  float* delta = nullptr;    // kChunkFloats, or one row where that is more
  float* product = nullptr;  // the same
  float* sums = nullptr;     // a sum per row of delta
  float* maximum = nullptr;  // of a chunk of rows
};
// Rows of a weight that fit a chunk.
int64_t ChunkRows(int64_t rows, int64_t floats_per_row);
uint64_t PlanWorkspace(const Block& block, const SearchOptions& options);
qm_status MakeWorkspace(qm_call* call, const Block& block, const SearchOptions& options,
                        Workspace* out);

// Scales of a site by channel; empty: leave it as it is (scale_search.cc).
qm_status SearchScale(qm_call* call, const Block& block, const Site& site,
                      const std::vector<InputStats>& stats, const SearchOptions& options,
                      const Workspace& workspace, std::vector<float>* out);

// The candidates of a site, without the identity: s of candidate k, channel c
//   s = x^ratio / (w^(1 - ratio) + 1e-4), or x^ratio without duo scaling, at least 1e-4, divided by
//   sqrt(max s min s)
// with x the mean |activation| and w the mean |weight| relative to the largest of its group. 1 for
// a channel that was never active.
std::vector<std::vector<float>> ScaleCandidates(const std::vector<double>& activation,
                                                const std::vector<double>& weight,
                                                const SearchOptions& options);

// Limits [out, groups] of |w| of a linear whose inputs are scaled by `in_scale` and whose rows are
// divided by `row_scale` (empty: not at all); kNoLimit where clipping does not help. `any`: whether
// it does anywhere (clip_search.cc).
inline constexpr float kNoLimit = 3.0e38f;
qm_status SearchClip(qm_call* call, const Block& block, uint64_t linear, const InputStats& stats,
                     const SearchOptions& options, const std::vector<float>& in_scale,
                     const std::vector<float>& row_scale, const Workspace& workspace, float* limits,
                     bool* any);

// x[i] of every input of a consumer, from one value per channel.
std::vector<float> ByInput(const Consumer& consumer, int64_t in_features,
                           const std::vector<float>& by_channel);

// ---- qm.block-transform/1 of the three methods (transform.cc)
// ------------------------------------
extern const qm_block_transform kTransformTable;       // awq: scales, and clipping if asked for
extern const qm_block_transform kScaleTransformTable;  // awq.scale
extern const qm_block_transform kClipTransformTable;   // awq.clip

}  // namespace quantmill::awq

#endif  // QUANTMILL_PLUGINS_AWQ_AWQ_H_
