// Clipping: AutoAWQ awq/quantize/quantizer.py (_search_best_clip, _compute_best_clip).
//
// For each row and group of a weight the limit on |w| among m (1 - t/grid), t = 0 .. grid/2 - 1, m
// the largest magnitude, whose rounding changes the group's part of the output least over the
// calibration rows X:
//   sum over x of (x_g (w' - w)_g)^2 = d H_gg d^T,  H = X^T X, H_gg its block of the group
// so that all rows count, not a sample of them.
#include <algorithm>

#include "awq.h"

namespace quantmill::awq {
namespace {

struct Chunk {
  int64_t first, rows;
};

// errors[((g * rows) + r) * steps + t] on the host.
qm_status Errors(qm_call* call, const Rows& rows, const Rounding& rounding, const ClipGrid& grid,
                 const qm_tensor& hessian, const float* scale, const Workspace& workspace,
                 std::vector<float>* errors, std::vector<float>* maxima) {
  const qm_host_linalg* linalg = qm::HostLinalg(call);
  if (linalg == nullptr) {
    return qm::Fail(call, QM_FAILED_PRECONDITION,
                    "the host offers no qm.host.linalg/1, which awq multiplies with");
  }
  const int64_t width = rounding.width, groups = rows.columns / width;
  const int64_t trials = rows.count * grid.steps;
  QM_TRY(ClipDeltas(call, rows, scale, rounding, grid, workspace.delta, workspace.maximum));
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * trials * width;
    const qm_tensor delta =
        qm::MakeMatrix(workspace.delta + begin, trials, width, width, call->device);
    const qm_tensor block =
        qm::MakeMatrix(static_cast<const float*>(hessian.data) + g * width * (rows.columns + 1),
                       width, width, rows.columns, call->device);
    qm_tensor product =
        qm::MakeMatrix(workspace.product + begin, trials, width, width, call->device);
    QM_TRY(linalg->gemm(call, 0, 0, 1.0, &delta, &block, 0.0, &product));
  }
  QM_TRY(RowDots(call, workspace.delta, workspace.product, groups * trials, width, workspace.sums));
  errors->resize(static_cast<size_t>(groups * trials));
  maxima->resize(static_cast<size_t>(rows.count * groups));
  QM_TRY(ToHost(call, workspace.sums, groups * trials, errors->data()));
  return ToHost(call, workspace.maximum, rows.count * groups, maxima->data());
}

}  // namespace

qm_status SearchClip(qm_call* call, const Block& block, uint64_t linear, const InputStats& stats,
                     const SearchOptions& options, const std::vector<float>& in_scale,
                     const std::vector<float>& row_scale, const Workspace& workspace, float* limits,
                     bool* any) {
  const Rows rows = block.rows(linear);
  const Rounding& rounding = block.roundings()[linear];
  const ClipGrid grid = {options.grid, options.clip_steps()};
  const int64_t groups = rows.columns / rounding.width;
  std::fill_n(limits, rows.count * groups, kNoLimit);
  *any = false;
  if (stats.rows == 0) return QM_OK;  // an expert nobody visited
  const float* scale = nullptr;
  if (!in_scale.empty()) {
    QM_TRY(ToDevice(call, in_scale.data(), rows.columns, workspace.scale));
    scale = workspace.scale;
  }
  const int64_t chunk = ChunkRows(rows.count, rows.columns * grid.steps);
  std::vector<float> errors, maxima;
  for (int64_t first = 0; first < rows.count; first += chunk) {
    QM_TRY(qm::Progress(call, -1));
    const int64_t count = std::min(chunk, rows.count - first);
    QM_TRY(Errors(call, rows.Slice(first, count), rounding, grid, stats.hessian, scale, workspace,
                  &errors, &maxima));
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = first + r;
      for (int64_t g = 0; g < groups; ++g) {
        const float* error = errors.data() + (g * count + r) * grid.steps;
        int32_t best = 0;
        for (int32_t t = 1; t < grid.steps; ++t) {
          if (error[t] < error[best]) best = t;
        }
        if (best == 0) continue;
        float limit = maxima[static_cast<size_t>(r * groups + g)] * grid.factor(best);
        if (!row_scale.empty()) limit /= row_scale[static_cast<size_t>(row)];
        limits[row * groups + g] = limit;
        *any = true;
      }
    }
  }
  return QM_OK;
}

}  // namespace quantmill::awq
