// GPTQ, cut into: the factor of a Hessian (factor.cc), the walk over column blocks (solve.cc), and
// the array operations both need, once for the CPU (gptq_ref.cc) and once for CUDA (gptq.cu).
//
// The algorithm is that of E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for
// Generative Pre-trained Transformers" (arXiv:2210.17323), as in IST-DASLab/gptq: gptq.py; the
// asymmetric correction is that of Y. Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for
// Asymmetric Calibration" (arXiv:2504.02692).
#ifndef QUANTMILL_PLUGINS_GPTQ_GPTQ_H_
#define QUANTMILL_PLUGINS_GPTQ_GPTQ_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "quantmill/sdk/affine_int.hpp"
#include "quantmill/sdk/affine_search.hpp"
#include "quantmill/sdk/plugin.hpp"
#include "quantmill/sdk/tensor.hpp"

namespace quantmill::gptq {

// Columns of a block live in one tile of fast memory (gptq.cu), which bounds their number.
inline constexpr int64_t kMaxBlockSize = 256;

struct Options {
  qm::AffineShape shape;
  qm::AffineSearch search;
  double damp = 0.01;
  int64_t block_size = 128;
  bool act_order = false;
  bool static_groups = false;
  double asymmetric_error = 0.0;

  // Groups are runs of columns in solving order, so their channels must be listed.
  bool needs_group_index() const { return act_order && !static_groups && shape.group_size > 0; }
};

// Order in which columns are solved. Device arrays of `in_features` entries.
struct ColumnOrder {
  const int32_t* channel = nullptr;   // original channel at each position; null = identity
  const int32_t* position = nullptr;  // the inverse
  const uint8_t* dead = nullptr;      // by original channel: 1 = input always 0; null = none
};

// What all linears on one input share. u is null when the weights are to be rounded plainly.
struct Factor {
  const void* hessian_data = nullptr;  // statistics it was made from
  const void* cross_data = nullptr;
  ColumnOrder order;
  std::vector<int32_t> channel;  // host copy, empty = identity
  const float* u = nullptr;      // [in, in] upper, u^T u = (H + damp)^-1 in solving order
  const float* p = nullptr;  // [in, in] alpha triu(D u^T, 1) u, valid above the diagonal; or null
  // Only with a clipping search: 1 / u_ii^2, which turns a squared rounding error into its share of
  // the loss the walk minimizes. By position in solving order, and by original channel.
  const float* importance = nullptr;
  const float* channel_importance = nullptr;
};

// Columns [begin, end) of all rows of one linear.
struct BlockTask {
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t begin = 0;
  int64_t end = 0;
  const float* work = nullptr;        // [rows, cols], solving order
  const float* u = nullptr;           // as in Factor
  const float* p = nullptr;           // as in Factor
  const int32_t* group_of = nullptr;  // [cols] group of each position
  float* err_t = nullptr;             // [end - begin, rows] out: (w - q) / u_ii
  float* q_t = nullptr;               // [end - begin, rows] out: q, only with p
  uint8_t* codes = nullptr;           // [rows, cols] out, solving order
};

// A run of groups of equal width, taken from columns `first_column` on.
struct GroupTask {
  const float* source = nullptr;  // rows `row_stride` apart
  int64_t row_stride = 0;
  int64_t rows = 0;
  int64_t first_column = 0;
  int64_t first_group = 0;
  int64_t count = 0;
  const float* importance = nullptr;  // of every column, from column 0 on; null = all equal
};

// Array operations on the call's device. Pointers are device pointers unless called host.
class Kernels {
 public:
  virtual ~Kernels() = default;

  virtual qm_status Upload(const void* host, int64_t bytes, void* device) = 0;
  // Diagonal of m [n, n] to the host; *finite says whether all of m is. Waits for the device.
  virtual qm_status ReadDiagonal(qm::TensorView<const float> m, float* host, bool* finite) = 0;
  // out[i, j] = m[channel[i], channel[j]].
  virtual qm_status PermuteSquare(qm::TensorView<const float> m, const ColumnOrder& order,
                                  float* out) = 0;
  // m[i, i] = diagonal[i].
  virtual qm_status SetDiagonal(float* m, int64_t n, const float* diagonal) = 0;
  // m[i, j] = factor * m[i, j] above the diagonal, 0 elsewhere.
  virtual qm_status KeepAboveDiagonal(float* m, int64_t n, float factor) = 0;
  // Index row * cols + column of the first weight that is not finite, or -1. Waits for the device.
  virtual qm_status FindNotFinite(qm::TensorView<const float> weight, int64_t* index) = 0;
  // out[r, j] = weight[r, channel[j]], 0 where that channel is dead.
  virtual qm_status GatherColumns(qm::TensorView<const float> weight, const ColumnOrder& order,
                                  float* out) = 0;
  // Scales and zero points of some groups, into the result tensors.
  virtual qm_status FindGroups(const GroupTask& task, const Options& options,
                               const qm::AffineTensors& out) = 0;
  // Quantizes the columns of a block one after the other, each error spread over those behind it in
  // the block. With u null: plain rounding.
  virtual qm_status SolveBlock(const BlockTask& task, const Options& options,
                               const qm::AffineTensors& groups) = 0;
  // codes u8 [rows, cols] in solving order -> bit stream in channel order.
  virtual qm_status Pack(const uint8_t* codes, const qm::AffineShape& shape,
                         const ColumnOrder& order, const qm::AffineTensors& out) = 0;
};

std::unique_ptr<Kernels> MakeCpuKernels(qm_call* call);
std::unique_ptr<Kernels> MakeCudaKernels(qm_call* call);

// Makes the factor of one input's statistics. row_count 0, or inputs that were always 0, or a
// Hessian no damping makes positive definite: u stays null, and a log line says so.
qm_status MakeFactor(qm_call* call, Kernels& kernels, const Options& options, const qm_stats* stats,
                     Factor* out);
// Scratch of MakeFactor in bytes.
uint64_t FactorBytes(const Options& options);

// Memory of a solve, for linears of up to the given sizes.
struct Workspace {
  float* work = nullptr;        // [rows, cols]
  uint8_t* codes = nullptr;     // [rows, cols]
  float* err_t = nullptr;       // [block_size, rows]
  float* q_t = nullptr;         // [block_size, rows], only with asymmetric_error
  int32_t* group_of = nullptr;  // [cols]
};
qm_status MakeWorkspace(qm_call* call, const Options& options, int64_t max_weights,
                        int64_t max_rows, int64_t max_cols, Workspace* out);
uint64_t WorkspaceBytes(const Options& options);

// Quantizes one linear into `out`. progress runs from `progress_begin` to `progress_end`.
struct ProgressRange {
  double begin = 0.0;
  double end = 1.0;
};
qm_status Solve(qm_call* call, Kernels& kernels, const Options& options, const Factor& factor,
                qm::TensorView<const float> weight, const Workspace& workspace,
                ProgressRange progress, const qm::AffineTensors& out);

}  // namespace quantmill::gptq

#endif  // QUANTMILL_PLUGINS_GPTQ_GPTQ_H_
