// Additive quantization of one linear, cut into: the alternation of codebook updates, scale updates
// and searches for codes (solver.cc), and the array operations it needs, once for the CPU
// (solver_cpu.cc) and once for CUDA (solver.cu).
//
// The model and its loss are those of V. Egiazarian et al., "Extreme Compression of Large Language
// Models via Additive Quantization" (arXiv:2401.06118), as in Vahe1994/AQLM: aq_engine.py,
// src/aq.py, src/beam_search_xtx.py. Where that takes Adam steps on codebooks and scales, these
// are solved for: the loss is quadratic in either.
#ifndef QUANTMILL_PLUGINS_AQLM_SOLVER_H_
#define QUANTMILL_PLUGINS_AQLM_SOLVER_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "codebook_format.h"

namespace quantmill::aqlm {

// Columns searched between two products with the Gram matrix, at least; a multiple of group_size.
inline constexpr int64_t kPanelColumns = 128;
inline constexpr int64_t kMaxGroup = 128;
// Hypotheses a search carries along at most, and their codes in a panel: all of them lie in the
// fast memory of one multiprocessor (solver.cu).
inline constexpr int32_t kMaxBeam = 16;
inline constexpr int64_t kMaxBeamCodes = 12288;

struct Options {
  Params params;
  int64_t out = 0, in = 0;
  double tolerance = 0.01;        // stop when an alternation lowers the loss by less, relatively
  int32_t beam = 1;               // hypotheses per row in a search
  int32_t steps = 100;            // conjugate-gradient steps per codebook update at most
  qm_dtype value_dtype = QM_F16;  // of stored codebooks and scales

  int64_t groups() const { return in / params.group_size; }
  int64_t panel_groups() const {
    return std::min<int64_t>(groups(), std::max<int64_t>(1, kPanelColumns / params.group_size));
  }
  int64_t panel_columns() const { return panel_groups() * params.group_size; }
};

// Rows `stride` floats apart; stride 0 repeats one row.
struct Rows {
  const float* data = nullptr;
  int64_t stride = 0;
};

// What the kernels work on: pointers on the call's device. Rows of several hypotheses are stacked:
// hypothesis h of row r is row h * out + r, so that the first `out` rows are those of the best.
struct Arrays {
  float* codebooks = nullptr;   // [M, 2^B, d]
  float* scales = nullptr;      // [out]
  float* ones = nullptr;        // [max(out, in)], all 1
  uint16_t* indices = nullptr;  // [beam * out, groups, M]
};

// Columns [first_group * d, ...) of a search, `groups` groups wide.
struct PanelTask {
  int64_t first_group = 0;
  int64_t groups = 0;
  const float* gram = nullptr;  // [in, in]
  float* residual = nullptr;    // [beam * out, in]: W - W^ of every hypothesis; updated
  float* product = nullptr;     // [beam * out, groups * d]: residual times these columns of gram
  // Only with a beam of more than one: the other halves of double buffers, and what to pick from.
  float* next_residual = nullptr;
  uint16_t* next_indices = nullptr;
  int32_t* live = nullptr;  // [out]: hypotheses of each row; 1 at first
  float* losses = nullptr;  // [beam, out]: loss of each, less that at the start of the search
};

// Array operations on the call's device. `rows` counts rows of the matrices; vectors are on the
// host and the calls that fill them wait for the device.
class Kernels {
 public:
  virtual ~Kernels() = default;

  virtual qm_status Upload(const void* host, int64_t bytes, void* device) = 0;
  virtual qm_status Download(const void* device, int64_t bytes, void* host) = 0;
  // Between places on the device.
  virtual qm_status Copy(const void* from, int64_t bytes, void* to) = 0;
  virtual qm_status Clear(void* device, int64_t bytes) = 0;
  // Element row * cols + column of the first value that is not finite, or -1.
  virtual qm_status FindNotFinite(Rows x, int64_t rows, int64_t cols, int64_t* index) = 0;
  // gram = hessian with `damp` added to the diagonal; hessian null: the identity.
  virtual qm_status MakeGram(Rows hessian, int64_t n, float damp, float* gram) = 0;
  virtual qm_status Diagonal(Rows matrix, int64_t n, std::vector<float>* out) = 0;
  // out[r] = sum over columns of a[r] b[r].
  virtual qm_status RowDots(Rows a, Rows b, int64_t rows, std::vector<double>* out) = 0;
  // out[r] = x[r * row_step] / scales[r * row_step]; 0 where the scale is 0.
  virtual qm_status Normalize(Rows x, int64_t row_step, int64_t rows, float* out) = 0;
  // Vectors of d numbers at (row * groups + group) of x [rows, in].
  virtual qm_status Pick(const float* x, const std::vector<int64_t>& at,
                         std::vector<float>* out) = 0;
  // Index m of every group of x [rows, in]: the nearest vector of codebook m, the lower of two
  // alike.
  virtual qm_status Nearest(const float* x, int64_t rows, int32_t m) = 0;
  // x -= vectors of codebook m.
  virtual qm_status Subtract(int64_t rows, int32_t m, float* x) = 0;
  // v[r] = factors[r] * (sum over m of codebooks[m, index]); out = base - v where base.data is not
  // null, else v. codebooks and factors lie on the device.
  virtual qm_status Decode(const float* codebooks, const float* factors, Rows base, int64_t rows,
                           float* out) = 0;
  // sums[m, c, :] = sum over (r, j) with index c of factors[r]^power x[r, j, :], for codebooks
  // [first, last). The result does not depend on the number of threads.
  virtual qm_status Scatter(Rows x, int64_t rows, const float* factors, int32_t power,
                            int32_t first, int32_t last, std::vector<double>* sums) = 0;
  // Searches the indices of a panel for all rows; solver.cc says how.
  virtual qm_status SearchPanel(const PanelTask& task) = 0;
  // Stored codes of the indices [out, groups, M], and back.
  virtual qm_status StoreCodes(void* codes) = 0;
  virtual qm_status LoadCodes(const void* codes) = 0;
  // out[i] = factor * (a[i] - b[i]) in f32, *sum = sum of (a[i] - b[i])^2; a and b of one dtype.
  virtual qm_status Difference(const void* a, const void* b, qm_dtype dtype, int64_t count,
                               float factor, float* out, double* sum) = 0;

  Arrays arrays;  // set by the solver
};

std::unique_ptr<Kernels> MakeCpuKernels(qm_call* call, const Options& options);
std::unique_ptr<Kernels> MakeCudaKernels(qm_call* call, const Options& options);

// Tensors of the result on the call's device.
struct Result {
  qm_tensor codes = {}, codebooks = {}, scales = {};
};

// Fills `out` from weight [out, in] and hessian [in, in] (null: all inputs count alike). With
// `final_loss` also the loss reached, sum over rows of (w - w^) gram (w - w^)^T.
qm_status Solve(qm_call* call, Kernels& kernels, const Options& options, Rows weight,
                const qm_tensor* hessian, const Result& out, double* final_loss);
// Scratch of Solve at most, what the kernels take included.
uint64_t SolverBytes(const Options& options);
uint64_t CpuKernelBytes(const Options& options);
uint64_t CudaKernelBytes(const Options& options);

}  // namespace quantmill::aqlm

#endif  // QUANTMILL_PLUGINS_AQLM_SOLVER_H_
