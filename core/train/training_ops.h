// The backward passes of the operations of core/tensor/backend.h, on one device. The gradients of a
// block (block_gradients.h) are written once over this interface and the backend; cpu_ops.cc and
// cuda_ops.cc implement it. The CPU implementation is the reference of the CUDA one.
//
// Conventions. d_NAME is the gradient of a loss with respect to NAME. Gradients are F32 and live on
// the backend's device; activations are in its activation dtype. The factors of matrix products are
// rounded to the activation dtype, sums are f32. Functions write the gradients of activations in
// full and ADD to the gradients of parameters (d_weight, d_bias), so that batches accumulate.
// INVALID_ARGUMENT for wrong shapes, dtypes or devices. Work is stream-ordered on CUDA.
//
// Determinism: results do not depend on the number of threads (fixed tiles, fixed order of sums, no
// atomics).
#ifndef QUANTMILL_CORE_TRAIN_TRAINING_OPS_H_
#define QUANTMILL_CORE_TRAIN_TRAINING_OPS_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/tensor/backend.h"

namespace quantmill {

// Rotary tables and what a row's position is, as in Backend::Rope.
struct RopeRows {
  Tensor cosine, sine;  // F32 [positions, head_dim / 2]
  int64_t first_position = 0;
  int64_t length = 0;  // row r has position first_position + r % length
  int64_t head_dim = 0;
};

// Weights of the two losses of a row; a row with target < 0 has none.
struct TokenLoss {
  float lm = 1;  // -log q[target], q = softmax(logits)
  float kl = 0;  // KL(p || q), p = softmax(teacher)
};

// One step of AdamW (Loshchilov and Hutter 2019, algorithm 2), as torch.optim.AdamW counts:
//   p -= rate decay p;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
//   p -= rate m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + epsilon)
// and, of p as it is then, a running mean:  average = average_keep average + (1 - average_keep) p
struct AdamWStep {
  double rate = 0, decay = 0;
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
  int64_t step = 1;          // counted from 1
  float gradient_scale = 1;  // on g: clipping, and the mean over accumulated batches
  double average_keep = 0;   // 0: the mean begins with this p
};

// One parameter under AdamW. Equal shapes, all F32 but `stored`, the tensor that a model computes
// with (any model float). average: empty where no mean is kept.
struct AdamWUpdate {
  AdamWStep step;
  Tensor gradient, master, first_moment, second_moment, stored, average;
};

class TrainingOps {
 public:
  explicit TrainingOps(Backend& backend) : backend_(backend) {}
  virtual ~TrainingOps() = default;
  TrainingOps(const TrainingOps&) = delete;
  TrainingOps& operator=(const TrainingOps&) = delete;

  Backend& backend() const { return backend_; }

  // `tensor` itself, or rounded (or widened) to the activation dtype.
  absl::StatusOr<Tensor> AsFactor(const Tensor& tensor);

  // ---- linear: y[rows, n] = x[rows, k] weight[n, k]^T + bias[n]; weight: any model float ----
  // d_y of both products is F32 or already AsFactor(d_y), which saves a second rounding of it.
  // d_x = d_y weight, on top of what d_x holds if `add`.
  absl::Status InputGradient(const Tensor& d_y, const Tensor& weight, bool add, Tensor* d_x);
  // d_weight += d_y^T x.
  absl::Status WeightGradient(const Tensor& d_y, const Tensor& x, Tensor* d_weight);
  // d_bias[n] += sum over rows of d_y.
  absl::Status BiasGradient(const Tensor& d_y, Tensor* d_bias);

  // Of y = x r weight, r = 1 / sqrt(mean(x^2) + eps), over runs of weight.dim(0) elements (as
  // Backend::RmsNorm). d_x is written, or added to if `add`, and may be d_y if not; d_weight may be
  // null. weight: any model float.
  absl::Status RmsNorm(const Tensor& x, const Tensor& weight, float eps, const Tensor& d_y,
                       bool add, Tensor* d_x, Tensor* d_weight);
  // The transpose of Backend::Rope, in place.
  absl::Status Rope(const RopeRows& shape, Tensor* d_x);
  // Of Backend::Attention with past_length 0 and as many keys and values as queries. The
  // probabilities are computed again.
  absl::Status Attention(const AttentionShape& shape, const Tensor& q, const Tensor& keys,
                         const Tensor& values, const Tensor& d_out, Tensor* d_q, Tensor* d_keys,
                         Tensor* d_values);
  // Of y = silu(gate) * up. d_up may be d_y.
  absl::Status SiluMultiply(const Tensor& gate, const Tensor& up, const Tensor& d_y, Tensor* d_gate,
                            Tensor* d_up);
  // target += x, both F32.
  absl::Status Add(const Tensor& x, Tensor* target);
  // Of scale sum((y - target)^2) / 2 with respect to y: d_y = scale (y - target). Returns
  // sum((y - target)^2), and waits for it. y, target: activation dtype, equal shapes.
  absl::StatusOr<double> SquaredError(const Tensor& y, const Tensor& target, float scale,
                                      Tensor* d_y);

  // ---- whole models ----
  // Row i of logits F32 [rows, vocab] becomes `scale` times the gradient of its loss with respect
  // to it; losses F32 [rows, 2] gets the row's two losses (lm, kl), unweighted and unscaled.
  // targets: I32 [rows] on the device, below vocab; teacher: logits of any model float, or empty
  // when weights.kl is 0.
  absl::Status TokenLosses(const Tensor& targets, const Tensor& teacher, const TokenLoss& weights,
                           float scale, Tensor* logits, Tensor* losses);
  // d_table[ids[i], :] += d_rows[i, :], in the order of rows. ids: I32 [rows] on the device, each
  // in [0, vocab).
  absl::Status Embed(const Tensor& ids, const Tensor& d_rows, Tensor* d_table);
  // Sum of the squares of all elements of F32 tensors; waits for it once.
  absl::StatusOr<double> SumOfSquares(absl::Span<const Tensor> tensors);
  // A step of AdamW on every parameter; `stored` becomes the rounded master value, the gradient
  // zero. INVALID_ARGUMENT also for average_keep outside [0, 1].
  absl::Status AdamW(absl::Span<const AdamWUpdate> updates);

 private:
  // What the functions above call once their arguments are checked and are not empty.
  virtual absl::Status DoBiasGradient(const Tensor& d_y, Tensor* d_bias) = 0;
  virtual absl::Status DoRmsNorm(const Tensor& x, const Tensor& weight, float eps,
                                 const Tensor& d_y, bool add, Tensor* d_x, Tensor* d_weight) = 0;
  virtual absl::Status DoRope(const RopeRows& shape, Tensor* d_x) = 0;
  virtual absl::Status DoAttention(const AttentionShape& shape, const Tensor& q, const Tensor& keys,
                                   const Tensor& values, const Tensor& d_out, Tensor* d_q,
                                   Tensor* d_keys, Tensor* d_values) = 0;
  virtual absl::Status DoSiluMultiply(const Tensor& gate, const Tensor& up, const Tensor& d_y,
                                      Tensor* d_gate, Tensor* d_up) = 0;
  virtual absl::Status DoAdd(const Tensor& x, Tensor* target) = 0;
  // The sum is taken from d_y, before it is scaled.
  virtual absl::Status DoDifference(const Tensor& y, const Tensor& target, Tensor* d_y) = 0;
  virtual absl::Status DoScale(float scale, Tensor* x) = 0;
  virtual absl::Status DoTokenLosses(const Tensor& targets, const Tensor& teacher,
                                     const TokenLoss& weights, float scale, Tensor* logits,
                                     Tensor* losses) = 0;
  virtual absl::Status DoEmbed(const Tensor& ids, const Tensor& d_rows, Tensor* d_table) = 0;
  virtual absl::StatusOr<double> DoSumOfSquares(absl::Span<const Tensor> tensors) = 0;
  virtual absl::Status DoAdamW(absl::Span<const AdamWUpdate> updates) = 0;

  absl::Status Expect(const char* op, const char* name, const Tensor& tensor, DType dtype,
                      const Shape& shape) const;
  absl::Status ExpectFactor(const char* op, const char* name, const Tensor& tensor,
                            const Shape& shape) const;
  absl::Status ExpectGradient(const char* op, const char* name, const Tensor* tensor,
                              const Shape& shape) const;

  Backend& backend_;
};

// `backend` must outlive the result. UNIMPLEMENTED for a kind of device without backward passes.
absl::StatusOr<std::unique_ptr<TrainingOps>> MakeTrainingOps(Backend& backend);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TRAIN_TRAINING_OPS_H_
