#include "core/train/training_ops.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/train/device_ops.h"

namespace quantmill {

AdamWFactors FactorsOf(const AdamWStep& step) {
  const double steps = static_cast<double>(step.step);
  const auto f32 = [](double value) { return static_cast<float>(value); };
  return {f32(step.beta1),
          f32(1 - step.beta1),
          f32(step.beta2),
          f32(1 - step.beta2),
          f32(1 - step.rate * step.decay),
          f32(step.rate / (1 - std::pow(step.beta1, steps))),
          f32(1 / std::sqrt(1 - std::pow(step.beta2, steps))),
          f32(step.epsilon),
          step.gradient_scale,
          f32(step.average_keep),
          f32(1 - step.average_keep)};
}

absl::Status TrainingOps::Expect(const char* op, const char* name, const Tensor& tensor,
                                 DType dtype, const Shape& shape) const {
  if (tensor.dtype() == dtype && tensor.shape() == shape && tensor.device() == backend_.device()) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "backward of ", op, ": ", name, " is ", AbslView(DTypeName(tensor.dtype())), " ",
      tensor.shape().ToString(), " on ", DeviceName(tensor.device()), ", expected ",
      AbslView(DTypeName(dtype)), " ", shape.ToString(), " on ", DeviceName(backend_.device())));
}

absl::Status TrainingOps::ExpectFactor(const char* op, const char* name, const Tensor& tensor,
                                       const Shape& shape) const {
  const bool rounded = tensor.dtype() == backend_.activation_dtype();
  return Expect(op, name, tensor, rounded ? tensor.dtype() : DType::kF32, shape);
}

absl::Status TrainingOps::ExpectGradient(const char* op, const char* name, const Tensor* tensor,
                                         const Shape& shape) const {
  if (tensor == nullptr || tensor->read_only()) {
    return absl::InvalidArgumentError(
        absl::StrCat("backward of ", op, ": ", name, " is missing or read-only"));
  }
  return Expect(op, name, *tensor, DType::kF32, shape);
}

absl::StatusOr<Tensor> TrainingOps::AsFactor(const Tensor& tensor) {
  if (tensor.dtype() == backend_.activation_dtype()) return tensor;
  QM_ASSIGN_OR_RETURN(Tensor factor,
                      backend_.Allocate(backend_.activation_dtype(), tensor.shape()));
  if (tensor.elements() > 0) QM_RETURN_IF_ERROR(backend_.Copy(tensor, &factor));
  return factor;
}

absl::Status TrainingOps::InputGradient(const Tensor& d_y, const Tensor& weight, bool add,
                                        Tensor* d_x) {
  constexpr char kOp[] = "linear";
  if (weight.rank() != 2 || d_y.rank() != 2 || !IsModelFloat(weight.dtype())) {
    return absl::InvalidArgumentError("backward of linear: the weight is no matrix of floats");
  }
  const int64_t rows = d_y.dim(0);
  QM_RETURN_IF_ERROR(ExpectFactor(kOp, "d_y", d_y, {rows, weight.dim(0)}));
  QM_RETURN_IF_ERROR(ExpectGradient(kOp, "d_x", d_x, {rows, weight.dim(1)}));
  if (rows == 0) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(const Tensor left, AsFactor(d_y));
  QM_ASSIGN_OR_RETURN(const Tensor right, AsFactor(weight));
  return backend_.Gemm(false, false, 1.0, left.View(), right.View(), add ? 1.0 : 0.0, d_x->View());
}

absl::Status TrainingOps::WeightGradient(const Tensor& d_y, const Tensor& x, Tensor* d_weight) {
  constexpr char kOp[] = "linear";
  if (d_y.rank() != 2 || x.rank() != 2) {
    return absl::InvalidArgumentError("backward of linear: d_y or x is no matrix");
  }
  const int64_t rows = d_y.dim(0);
  QM_RETURN_IF_ERROR(ExpectFactor(kOp, "d_y", d_y, {rows, d_y.dim(1)}));
  QM_RETURN_IF_ERROR(Expect(kOp, "x", x, backend_.activation_dtype(), {rows, x.dim(1)}));
  QM_RETURN_IF_ERROR(ExpectGradient(kOp, "d_weight", d_weight, {d_y.dim(1), x.dim(1)}));
  if (rows == 0) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(const Tensor left, AsFactor(d_y));
  return backend_.Gemm(true, false, 1.0, left.View(), x.View(), 1.0, d_weight->View());
}

absl::Status TrainingOps::BiasGradient(const Tensor& d_y, Tensor* d_bias) {
  constexpr char kOp[] = "linear";
  if (d_y.rank() != 2) return absl::InvalidArgumentError("backward of linear: d_y is no matrix");
  QM_RETURN_IF_ERROR(Expect(kOp, "d_y", d_y, DType::kF32, d_y.shape()));
  QM_RETURN_IF_ERROR(ExpectGradient(kOp, "d_bias", d_bias, {d_y.dim(1)}));
  return d_y.elements() == 0 ? absl::OkStatus() : DoBiasGradient(d_y, d_bias);
}

absl::Status TrainingOps::RmsNorm(const Tensor& x, const Tensor& weight, float eps,
                                  const Tensor& d_y, bool add, Tensor* d_x, Tensor* d_weight) {
  constexpr char kOp[] = "norm";
  if (x.rank() != 2 || weight.rank() != 1 || !IsModelFloat(weight.dtype()) || weight.dim(0) == 0 ||
      x.dim(1) % weight.dim(0) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("backward of norm: x ", x.shape().ToString(),
                                                   " does not consist of runs of the weight ",
                                                   weight.shape().ToString()));
  }
  QM_RETURN_IF_ERROR(Expect(kOp, "x", x, backend_.activation_dtype(), x.shape()));
  QM_RETURN_IF_ERROR(Expect(kOp, "weight", weight, weight.dtype(), weight.shape()));
  QM_RETURN_IF_ERROR(Expect(kOp, "d_y", d_y, DType::kF32, x.shape()));
  QM_RETURN_IF_ERROR(ExpectGradient(kOp, "d_x", d_x, x.shape()));
  if (add && d_x->data() == d_y.data()) {
    return absl::InvalidArgumentError("backward of norm: d_x cannot be d_y when it is added to");
  }
  if (d_weight != nullptr) {
    QM_RETURN_IF_ERROR(ExpectGradient(kOp, "d_weight", d_weight, weight.shape()));
  }
  if (x.elements() == 0) return absl::OkStatus();
  return DoRmsNorm(x, weight, eps, d_y, add, d_x, d_weight);
}

absl::Status TrainingOps::Rope(const RopeRows& shape, Tensor* d_x) {
  constexpr char kOp[] = "rope";
  if (d_x == nullptr || d_x->rank() != 2 || shape.head_dim < 2 || shape.head_dim % 2 != 0 ||
      d_x->dim(1) % shape.head_dim != 0 || shape.length < 1 || shape.first_position < 0 ||
      shape.cosine.rank() != 2 || shape.cosine.dim(0) < shape.first_position + shape.length) {
    return absl::InvalidArgumentError(
        "backward of rope: d_x is no rows of heads, or the tables are too short");
  }
  const Shape table = {shape.cosine.dim(0), shape.head_dim / 2};
  QM_RETURN_IF_ERROR(Expect(kOp, "cosine", shape.cosine, DType::kF32, table));
  QM_RETURN_IF_ERROR(Expect(kOp, "sine", shape.sine, DType::kF32, table));
  QM_RETURN_IF_ERROR(ExpectGradient(kOp, "d_x", d_x, d_x->shape()));
  return d_x->elements() == 0 ? absl::OkStatus() : DoRope(shape, d_x);
}

absl::Status TrainingOps::Attention(const AttentionShape& shape, const Tensor& q,
                                    const Tensor& keys, const Tensor& values, const Tensor& d_out,
                                    Tensor* d_q, Tensor* d_keys, Tensor* d_values) {
  constexpr char kOp[] = "attention";
  if (shape.past_length != 0 || shape.batch < 1 || shape.query_length < 0 || shape.kv_heads < 1 ||
      shape.heads % shape.kv_heads != 0 || shape.head_dim < 1 || shape.sliding_window < 0) {
    return absl::InvalidArgumentError(
        "backward of attention: heads do not divide, or there are keys from before the queries");
  }
  const int64_t rows = shape.batch * shape.query_length;
  const Shape queries = {rows, shape.heads * shape.head_dim};
  const Shape pairs = {rows, shape.kv_heads * shape.head_dim};
  const DType dtype = backend_.activation_dtype();
  QM_RETURN_IF_ERROR(Expect(kOp, "q", q, dtype, queries));
  QM_RETURN_IF_ERROR(Expect(kOp, "keys", keys, dtype, pairs));
  QM_RETURN_IF_ERROR(Expect(kOp, "values", values, dtype, pairs));
  QM_RETURN_IF_ERROR(Expect(kOp, "d_out", d_out, DType::kF32, queries));
  QM_RETURN_IF_ERROR(ExpectGradient(kOp, "d_q", d_q, queries));
  QM_RETURN_IF_ERROR(ExpectGradient(kOp, "d_keys", d_keys, pairs));
  QM_RETURN_IF_ERROR(ExpectGradient(kOp, "d_values", d_values, pairs));
  if (rows == 0) return absl::OkStatus();
  return DoAttention(shape, q, keys, values, d_out, d_q, d_keys, d_values);
}

absl::Status TrainingOps::SiluMultiply(const Tensor& gate, const Tensor& up, const Tensor& d_y,
                                       Tensor* d_gate, Tensor* d_up) {
  constexpr char kOp[] = "silu";
  QM_RETURN_IF_ERROR(Expect(kOp, "gate", gate, backend_.activation_dtype(), gate.shape()));
  QM_RETURN_IF_ERROR(Expect(kOp, "up", up, backend_.activation_dtype(), gate.shape()));
  QM_RETURN_IF_ERROR(Expect(kOp, "d_y", d_y, DType::kF32, gate.shape()));
  QM_RETURN_IF_ERROR(ExpectGradient(kOp, "d_gate", d_gate, gate.shape()));
  QM_RETURN_IF_ERROR(ExpectGradient(kOp, "d_up", d_up, gate.shape()));
  return gate.elements() == 0 ? absl::OkStatus() : DoSiluMultiply(gate, up, d_y, d_gate, d_up);
}

absl::Status TrainingOps::Add(const Tensor& x, Tensor* target) {
  constexpr char kOp[] = "sum";
  QM_RETURN_IF_ERROR(Expect(kOp, "x", x, DType::kF32, x.shape()));
  QM_RETURN_IF_ERROR(ExpectGradient(kOp, "target", target, x.shape()));
  return x.elements() == 0 ? absl::OkStatus() : DoAdd(x, target);
}

absl::StatusOr<double> TrainingOps::SquaredError(const Tensor& y, const Tensor& target, float scale,
                                                 Tensor* d_y) {
  constexpr char kOp[] = "squared error";
  QM_RETURN_IF_ERROR(Expect(kOp, "y", y, backend_.activation_dtype(), y.shape()));
  QM_RETURN_IF_ERROR(Expect(kOp, "target", target, backend_.activation_dtype(), y.shape()));
  QM_RETURN_IF_ERROR(ExpectGradient(kOp, "d_y", d_y, y.shape()));
  if (y.elements() == 0) return 0.0;
  QM_RETURN_IF_ERROR(DoDifference(y, target, d_y));
  QM_ASSIGN_OR_RETURN(const double sum, DoSumOfSquares({d_y, 1}));
  if (scale != 1) QM_RETURN_IF_ERROR(DoScale(scale, d_y));
  return sum;
}

absl::Status TrainingOps::TokenLosses(const Tensor& targets, const Tensor& teacher,
                                      const TokenLoss& weights, float scale, Tensor* logits,
                                      Tensor* losses) {
  constexpr char kOp[] = "token losses";
  if (logits == nullptr || logits->rank() != 2 || (teacher.empty() && weights.kl != 0)) {
    return absl::InvalidArgumentError(
        "token losses: no matrix of logits, or no teacher for the KL divergence");
  }
  const int64_t rows = logits->dim(0);
  QM_RETURN_IF_ERROR(ExpectGradient(kOp, "logits", logits, logits->shape()));
  QM_RETURN_IF_ERROR(ExpectGradient(kOp, "losses", losses, {rows, 2}));
  QM_RETURN_IF_ERROR(Expect(kOp, "targets", targets, DType::kI32, {rows}));
  if (!teacher.empty()) {
    if (!IsModelFloat(teacher.dtype())) {
      return absl::InvalidArgumentError("token losses: the teacher's logits are no floats");
    }
    QM_RETURN_IF_ERROR(Expect(kOp, "teacher", teacher, teacher.dtype(), logits->shape()));
  }
  if (logits->elements() == 0) return absl::OkStatus();
  return DoTokenLosses(targets, teacher, weights, scale, logits, losses);
}

absl::Status TrainingOps::Embed(const Tensor& ids, const Tensor& d_rows, Tensor* d_table) {
  constexpr char kOp[] = "embedding";
  if (d_rows.rank() != 2 || d_table == nullptr || d_table->rank() != 2) {
    return absl::InvalidArgumentError("backward of embedding: d_rows or d_table is no matrix");
  }
  QM_RETURN_IF_ERROR(Expect(kOp, "ids", ids, DType::kI32, {d_rows.dim(0)}));
  QM_RETURN_IF_ERROR(Expect(kOp, "d_rows", d_rows, DType::kF32, {d_rows.dim(0), d_table->dim(1)}));
  QM_RETURN_IF_ERROR(ExpectGradient(kOp, "d_table", d_table, d_table->shape()));
  return d_rows.elements() == 0 ? absl::OkStatus() : DoEmbed(ids, d_rows, d_table);
}

absl::StatusOr<double> TrainingOps::SumOfSquares(absl::Span<const Tensor> tensors) {
  int64_t elements = 0;
  for (const Tensor& x : tensors) {
    QM_RETURN_IF_ERROR(Expect("sum of squares", "x", x, DType::kF32, x.shape()));
    elements += x.elements();
  }
  if (elements == 0) return 0.0;
  return DoSumOfSquares(tensors);
}

absl::Status TrainingOps::AdamW(absl::Span<const AdamWUpdate> updates) {
  constexpr char kOp[] = "AdamW";
  for (const AdamWUpdate& u : updates) {
    const Shape& shape = u.gradient.shape();
    QM_RETURN_IF_ERROR(ExpectGradient(kOp, "gradient", &u.gradient, shape));
    QM_RETURN_IF_ERROR(ExpectGradient(kOp, "master", &u.master, shape));
    QM_RETURN_IF_ERROR(ExpectGradient(kOp, "first_moment", &u.first_moment, shape));
    QM_RETURN_IF_ERROR(ExpectGradient(kOp, "second_moment", &u.second_moment, shape));
    if (!IsModelFloat(u.stored.dtype()) || u.stored.read_only()) {
      return absl::InvalidArgumentError("AdamW: a stored parameter is no writable float tensor");
    }
    QM_RETURN_IF_ERROR(Expect(kOp, "stored", u.stored, u.stored.dtype(), shape));
    if (!u.average.empty()) {
      QM_RETURN_IF_ERROR(ExpectGradient(kOp, "average", &u.average, shape));
    }
    if (!(u.step.average_keep >= 0 && u.step.average_keep <= 1)) {
      return absl::InvalidArgumentError("AdamW: average_keep is outside [0, 1]");
    }
    if (u.step.step < 1) return absl::InvalidArgumentError("AdamW: steps are counted from 1");
  }
  return DoAdamW(updates);
}

absl::StatusOr<std::unique_ptr<TrainingOps>> MakeTrainingOps(Backend& backend) {
  std::unique_ptr<TrainingOps> ops =
      backend.device().is_cpu() ? MakeCpuTrainingOps(backend) : MakeCudaTrainingOps(backend);
  if (ops != nullptr) return ops;
  return absl::UnimplementedError(
      ErrorText(absl::StrCat("no gradients on ", DeviceName(backend.device())),
                "this build has no backward passes for it", "use --device cpu"));
}

}  // namespace quantmill
