// Half-quadratic quantization of one linear: options, result tensors, and the CPU path and the CUDA
// path behind one interface.
#ifndef QUANTMILL_PLUGINS_HQQ_HQQ_H_
#define QUANTMILL_PLUGINS_HQQ_HQQ_H_

#include <cstdint>
#include <vector>

#include "quantmill/sdk/affine_int.hpp"
#include "quantmill/sdk/tensor.hpp"

namespace quantmill::hqq {

// Scales that share a range when they are stored as bytes (FORMATS.md).
inline constexpr int64_t kScaleBlock = 128;
// Groups whose errors are added up before the rest: the unit of work, and of summation.
inline constexpr int64_t kTileGroups = 32;
// Partial sums over the tiles: sum k takes tiles k, k + 128, ...; they are joined pairwise.
inline constexpr int kTotalLanes = 128;

// Plain data: kernels take it by value.
struct Options {
  int64_t out_features = 0, in_features = 0;
  int64_t group_size = 0;  // weights per group, a divisor of in (axis 1) or of out (axis 0)
  int32_t bits = 4;
  int32_t axis = 1;
  float norm = 0.7f;
  int32_t iterations = 20;
  qm_dtype scale_dtype = QM_F16;  // of scales and zero points that are not bytes
  bool quantize_scale = false;
  bool quantize_zero = false;

  QM_HD float max_code() const { return static_cast<float>((1 << bits) - 1); }
  // Groups are numbered as scales lie in memory: row-major [out, in / group_size], or for axis 0
  // [out / group_size, in].
  QM_HD int64_t groups() const { return out_features * in_features / group_size; }
  QM_HD int64_t scale_columns() const { return axis == 1 ? in_features / group_size : in_features; }
  QM_HD int64_t scale_rows() const { return groups() / scale_columns(); }
  QM_HD int64_t tiles() const { return (groups() + kTileGroups - 1) / kTileGroups; }
  QM_HD int64_t scale_blocks() const { return (groups() + kScaleBlock - 1) / kScaleBlock; }
  QM_HD int64_t words() const { return qm::AffineWordsPerRow(in_features, bits); }
  QM_HD int64_t GroupOf(int64_t row, int64_t column) const {
    return axis == 1 ? row * scale_columns() + column / group_size
                     : row % scale_rows() * in_features + column;
  }
};

// The shrinkage of one iteration: E = sign(r) max(|r| - |r|^(norm-1) / beta, 0), which is 0 up to
// |r| = threshold = beta^(-1 / (2 - norm)).
struct Step {
  float inverse_beta;
  float threshold;
};

// Tensors of the result on the call's device. scale and zero are U8 where they are quantized, and
// then have a range (step, offset): [scale_blocks, 2] and [1, 2].
struct Result {
  qm_tensor codes = {}, scale = {}, zero = {}, scale_range = {}, zero_range = {};
};

// Fill `out` from weight [out, in]. `steps` has one entry per iteration. INVALID_ARGUMENT names the
// first weight that is not finite; CANCELLED when progress says so.
qm_status QuantizeCpu(qm_call* call, const Options& options, const std::vector<Step>& steps,
                      qm::TensorView<const float> weight, const Result& out);
qm_status QuantizeCuda(qm_call* call, const Options& options, const std::vector<Step>& steps,
                       qm::TensorView<const float> weight, const Result& out);
// Scratch either path takes at most.
uint64_t CpuScratchBytes(const Options& options);
uint64_t CudaScratchBytes(const Options& options);

}  // namespace quantmill::hqq

#endif  // QUANTMILL_PLUGINS_HQQ_HQQ_H_
