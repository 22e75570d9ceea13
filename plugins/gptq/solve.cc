// One linear: groups, column blocks, trailing updates, packing.
//
//   W is [rows, cols] in solving order, u upper with u^T u = (H + damp)^-1:
//     for each block [b, e) of columns
//       scales of the groups that begin in it, from W as updated up to the block; with a clipping
//         search: the range with the least sum of (w - round(w))^2 / u_ii^2
//       for i in [b, e): q = round(w_i); err_i = (w_i - q) / u_ii
//                        W[:, i+1..e) -= err_i u[i, i+1..e) - w_i p[i, i+1..e)
//       W[:, e..) -= err u[b..e, e..) - q p[b..e, e..)
//
// The last term takes the block's columns as they are after the loop, which is q, as the published
// code of GPTAQ does (GPTQModel: gptqmodel/quantization/gptaq.py).
#include <algorithm>

#include "gptq.h"

namespace quantmill::gptq {
namespace {

GroupTask WholeMatrix(const float* source, int64_t row_stride, const qm::AffineShape& shape,
                      const float* importance) {
  GroupTask task;
  task.importance = importance;
  task.source = source;
  task.row_stride = row_stride;
  task.rows = shape.out_features;
  task.count = shape.groups();
  return task;
}

// Groups known before the walk: of a whole row, of the original columns (static), or of plain
// rounding. `workspace.work` is used as a buffer.
qm_status FindGroupsAhead(Kernels& kernels, const Options& options, const Factor& factor,
                          qm::TensorView<const float> weight, const Workspace& workspace,
                          const qm::AffineTensors& out) {
  const qm::AffineShape& shape = options.shape;
  if (factor.u == nullptr || shape.group_size < 0) {
    return kernels.FindGroups(
        WholeMatrix(weight.data(), weight.stride(0), shape, factor.channel_importance), options,
        out);
  }
  ColumnOrder original;
  original.dead = factor.order.dead;
  QM_TRY(kernels.GatherColumns(weight, original, workspace.work));
  return kernels.FindGroups(
      WholeMatrix(workspace.work, shape.in_features, shape, factor.channel_importance), options,
      out);
}

// Groups that begin in [begin, end).
qm_status FindGroupsOfBlock(Kernels& kernels, const Options& options, const Factor& factor,
                            const float* work, int64_t begin, int64_t end,
                            const qm::AffineTensors& out) {
  const int64_t width = options.shape.group_width();
  GroupTask task;
  task.source = work;
  task.row_stride = options.shape.in_features;
  task.rows = options.shape.out_features;
  task.first_group = (begin + width - 1) / width;
  task.count = (end + width - 1) / width - task.first_group;
  task.first_column = task.first_group * width;
  task.importance = factor.importance;
  return task.count > 0 ? kernels.FindGroups(task, options, out) : QM_OK;
}

qm_status UploadGroupOf(Kernels& kernels, const Options& options, const Factor& factor,
                        bool by_position, int32_t* device) {
  const int64_t cols = options.shape.in_features, width = options.shape.group_width();
  std::vector<int32_t> group_of(static_cast<size_t>(cols));
  for (int64_t j = 0; j < cols; ++j) {
    const int64_t column = by_position || factor.channel.empty() ? j : factor.channel[j];
    group_of[j] = static_cast<int32_t>(column / width);
  }
  return kernels.Upload(group_of.data(), cols * static_cast<int64_t>(sizeof(int32_t)), device);
}

// W[:, end..) -= err u[begin..end, end..) - q p[begin..end, end..).
qm_status UpdateTrailing(qm_call* call, const qm_host_linalg& linalg, const BlockTask& task,
                         float* work) {
  const int64_t width = task.end - task.begin, behind = task.cols - task.end;
  if (behind == 0) return QM_OK;
  const qm_device device = call->device;
  const int64_t at = task.begin * task.cols + task.end;
  qm_tensor c = qm::MakeMatrix(work + task.end, task.rows, behind, task.cols, device);
  const qm_tensor err = qm::MakeMatrix(task.err_t, width, task.rows, task.rows, device);
  const qm_tensor u = qm::MakeMatrix(task.u + at, width, behind, task.cols, device);
  QM_TRY(linalg.gemm(call, 1, 0, -1.0, &err, &u, 1.0, &c));
  if (task.p == nullptr) return QM_OK;
  const qm_tensor q = qm::MakeMatrix(task.q_t, width, task.rows, task.rows, device);
  const qm_tensor p = qm::MakeMatrix(task.p + at, width, behind, task.cols, device);
  return linalg.gemm(call, 1, 0, 1.0, &q, &p, 1.0, &c);
}

qm_status UploadGroupIndex(Kernels& kernels, const Options& options, const Factor& factor,
                           const qm::AffineTensors& out) {
  const int64_t cols = options.shape.in_features, width = options.shape.group_width();
  std::vector<int32_t> index(static_cast<size_t>(cols));
  for (int64_t j = 0; j < cols; ++j) {
    const int64_t channel = factor.channel.empty() ? j : factor.channel[j];
    index[channel] = static_cast<int32_t>(j / width);
  }
  return kernels.Upload(index.data(), cols * static_cast<int64_t>(sizeof(int32_t)),
                        out.group_index.data);
}

}  // namespace

uint64_t WorkspaceBytes(const Options& options) {
  const uint64_t rows = static_cast<uint64_t>(options.shape.out_features);
  const uint64_t cols = static_cast<uint64_t>(options.shape.in_features);
  const uint64_t columns = options.asymmetric_error > 0.0 ? 2 : 1;
  constexpr uint64_t kRounding = uint64_t{8} * 256;
  return rows * cols * (sizeof(float) + 1) + cols * sizeof(int32_t) +
         columns * static_cast<uint64_t>(options.block_size) * rows * sizeof(float) + kRounding;
}

qm_status MakeWorkspace(qm_call* call, const Options& options, int64_t max_weights,
                        int64_t max_rows, int64_t max_cols, Workspace* out) {
  const qm_device device = call->device;
  QM_TRY(qm::Scratch(call, device, max_weights, "the working copy", &out->work));
  QM_TRY(qm::Scratch(call, device, max_weights, "codes", &out->codes));
  QM_TRY(qm::Scratch(call, device, max_cols, "groups", &out->group_of));
  const int64_t block = options.block_size * max_rows;
  QM_TRY(qm::Scratch(call, device, block, "errors", &out->err_t));
  if (options.asymmetric_error > 0.0) {
    QM_TRY(qm::Scratch(call, device, block, "quantized columns", &out->q_t));
  }
  return QM_OK;
}

qm_status Solve(qm_call* call, Kernels& kernels, const Options& options, const Factor& factor,
                qm::TensorView<const float> weight, const Workspace& workspace,
                ProgressRange progress, const qm::AffineTensors& out) {
  const qm::AffineShape& shape = options.shape;
  int64_t bad = -1;
  QM_TRY(kernels.FindNotFinite(weight, &bad));
  if (bad >= 0) {
    return qm::NotFinite(call, bad / shape.in_features, bad % shape.in_features);
  }
  const bool walk = factor.u != nullptr;
  const bool groups_ahead = !walk || shape.group_size < 0 || options.static_groups;
  if (groups_ahead) {
    QM_TRY(FindGroupsAhead(kernels, options, factor, weight, workspace, out));
  }
  QM_TRY(kernels.GatherColumns(weight, factor.order, workspace.work));
  QM_TRY(UploadGroupOf(kernels, options, factor, !groups_ahead, workspace.group_of));

  BlockTask task;
  task.rows = shape.out_features;
  task.cols = shape.in_features;
  task.work = workspace.work;
  task.u = factor.u;
  task.p = factor.p;
  task.group_of = workspace.group_of;
  task.err_t = workspace.err_t;
  task.q_t = workspace.q_t;
  task.codes = workspace.codes;
  const qm_host_linalg* linalg = walk ? qm::HostLinalg(call) : nullptr;
  for (int64_t begin = 0; begin < task.cols; begin += options.block_size) {
    const double part = static_cast<double>(begin) / static_cast<double>(task.cols);
    QM_TRY(qm::Progress(call, progress.begin + part * (progress.end - progress.begin)));
    task.begin = begin;
    task.end = std::min(begin + options.block_size, task.cols);
    if (!groups_ahead) {
      QM_TRY(FindGroupsOfBlock(kernels, options, factor, workspace.work, begin, task.end, out));
    }
    QM_TRY(kernels.SolveBlock(task, options, out));
    if (walk) QM_TRY(UpdateTrailing(call, *linalg, task, workspace.work));
  }
  QM_TRY(kernels.Pack(workspace.codes, shape, factor.order, out));
  if (out.group_index.data == nullptr) return QM_OK;
  return UploadGroupIndex(kernels, options, factor, out);
}

}  // namespace quantmill::gptq
