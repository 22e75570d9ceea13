// Kernels of the backward passes. CPU reference: core/train/cpu_ops.cc. Gradients are f32; `dtype`
// is that of activations. All work goes to `stream`; nothing is synchronised.
#ifndef QUANTMILL_CORE_TRAIN_BACKWARD_KERNELS_CUH_
#define QUANTMILL_CORE_TRAIN_BACKWARD_KERNELS_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/types/span.h"
#include "core/tensor/dtype.h"
#include "core/train/adamw_factors.h"

namespace quantmill::cuda {

// ---- norm_backward.cu ----
struct NormBackward {
  const void* x;  // [runs, width] of dtype
  DType dtype;
  const void* weight;  // [width] of weight_dtype
  DType weight_dtype;
  const float* d_y;  // [runs, width]
  float* d_x;        // [runs, width]; may be d_y when `add` is false
  int64_t runs, width;
  float eps;
  bool add;  // d_x += instead of d_x =
};
cudaError_t LaunchNormBackward(const NormBackward& norm, cudaStream_t stream);
// scale[run] = (mean(x[run]^2) + eps)^-1/2.
cudaError_t LaunchInverseRms(const void* x, DType dtype, int64_t runs, int64_t width, float eps,
                             float* scale, cudaStream_t stream);

// ---- column_sums.cu ----
// Floats that `partial` below must hold.
int64_t ColumnPartials(int64_t rows, int64_t columns);
// sums[j] += sum_i d_y[i, j].
cudaError_t LaunchColumnSums(const float* d_y, int64_t rows, int64_t columns, float* partial,
                             float* sums, cudaStream_t stream);
// sums[j] += sum_i d_y[i, j] x[i, j] scale[i].
cudaError_t LaunchScaledColumnSums(const float* d_y, const void* x, DType dtype, const float* scale,
                                   int64_t rows, int64_t columns, float* partial, float* sums,
                                   cudaStream_t stream);

// ---- elementwise_backward.cu ----
// d_up may be d_y.
cudaError_t LaunchSiluBackward(const void* gate, const void* up, DType dtype, const float* d_y,
                               int64_t count, float* d_gate, float* d_up, cudaStream_t stream);
// d_x: [rows, heads * head_dim], row r at position first_position + r % length; tables f32
// [positions, head_dim / 2].
cudaError_t LaunchRopeBackward(const float* cosine, const float* sine, int64_t first_position,
                               int64_t length, int64_t rows, int64_t heads, int64_t head_dim,
                               float* d_x, cudaStream_t stream);
// target += x.
cudaError_t LaunchAddF32(const float* x, int64_t count, float* target, cudaStream_t stream);

// ---- difference.cu ----
// out = a - b; a, b of dtype.
cudaError_t LaunchDifference(const void* a, const void* b, DType dtype, int64_t count, float* out,
                             cudaStream_t stream);
// x *= scale.
cudaError_t LaunchScaleF32(float scale, int64_t count, float* x, cudaStream_t stream);

// ---- softmax_rows.cu ----
// A tile of causal attention: row r is the query at position first_query + r, column c the key at
// position first_key + c; a query sees keys max(0, position - window + 1) .. position (window 0:
// all up to position).
struct ScoreTile {
  int64_t rows, keys;
  int64_t first_query, first_key;
  int64_t window;
};
// p[r, :] = softmax of the scores that row r sees, 0 elsewhere. scores f32, p of dtype, both
// [rows, keys]. Every row sees a key.
cudaError_t LaunchSoftmaxRows(const ScoreTile& tile, const float* scores, DType dtype, void* p,
                              cudaStream_t stream);
// p[r, c] = p (d_p - sum_c p d_p): p becomes the gradient of the scores.
cudaError_t LaunchSoftmaxBackward(const ScoreTile& tile, const float* d_p, DType dtype, void* p,
                                  cudaStream_t stream);

// ---- token_losses.cu ----
struct TokenLossRows {
  float* logits;           // [rows, vocab]; become gradients
  const int32_t* targets;  // [rows]; negative: not counted
  const void* teacher;     // [rows, vocab] of teacher_dtype; null: none
  DType teacher_dtype;     // F32 where there is none
  float* losses;           // [rows, 2]
  int64_t rows, vocab;
  float lm_weight, kl_weight, scale;
};
cudaError_t LaunchTokenLosses(const TokenLossRows& rows, cudaStream_t stream);

// ---- embed_backward.cu ----
// ids in [0, vocab); table: [vocab, width].
cudaError_t LaunchEmbedBackward(const int32_t* ids, const float* d_rows, int64_t rows,
                                int64_t vocab, int64_t width, float* table, cudaStream_t stream);

// ---- optimizer.cu ----
struct SquaresItem {
  const float* x;
  int64_t count;
};
// Doubles that `partial` below must hold.
int64_t SquarePartials(absl::Span<const SquaresItem> items);
// total[0] = the sum of the squares of all elements.
cudaError_t LaunchSumOfSquares(absl::Span<const SquaresItem> items, double* partial, double* total,
                               cudaStream_t stream);
struct AdamWItem {
  float* gradient;  // becomes 0
  float* p;
  float* first;
  float* second;
  void* stored;  // becomes p, rounded to stored_dtype
  DType stored_dtype;
  float* average;  // null: no mean is kept
  int64_t count;
  AdamWFactors factors;
};
cudaError_t LaunchAdamW(absl::Span<const AdamWItem> items, cudaStream_t stream);

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_TRAIN_BACKWARD_KERNELS_CUH_
