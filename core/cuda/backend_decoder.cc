// Normalization, positions, attention and element-wise steps of the CUDA backend.
#include "core/base/status.h"
#include "core/cuda/attention.cuh"
#include "core/cuda/cuda_backend.h"
#include "core/cuda/cuda_status.h"
#include "core/cuda/elementwise.cuh"
#include "core/cuda/norm.cuh"
#include "core/cuda/rope.cuh"

namespace quantmill::cuda {
namespace {

constexpr int64_t kMaxGridYZ = 65535;               // CUDA's limit
constexpr int64_t kMaxPositions = 32 * kMaxGridYZ;  // grid z counts tiles of 32 queries or more

absl::Status CheckAttention(const Checker& checks, const AttentionShape& s) {
  QM_RETURN_IF_ERROR(checks.Expect(
      s.batch >= 0 && s.query_length >= 0 && s.past_length >= 0 && s.sliding_window >= 0,
      "batch, query_length, past_length and sliding_window must not be negative"));
  QM_RETURN_IF_ERROR(checks.Expect(s.kv_heads >= 1 && s.heads >= 1 && s.heads % s.kv_heads == 0,
                                   "kv_heads ", s.kv_heads, " must divide heads ", s.heads));
  QM_RETURN_IF_ERROR(checks.Expect(s.head_dim >= 1 && s.head_dim <= kMaxHeadDim, "head_dim ",
                                   s.head_dim, " is not in 1 to ", kMaxHeadDim));
  QM_RETURN_IF_ERROR(checks.Expect(s.scale > 0, "scale must be positive"));
  return checks.Expect(s.past_length + s.query_length <= kMaxPositions && s.batch <= kMaxGridYZ &&
                           s.heads <= kMaxGridYZ,
                       "too many positions, sequences or heads");
}

}  // namespace

absl::Status CudaBackend::RmsNorm(const Tensor& x, const Tensor& weight, float eps, Tensor* out) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("rms norm");
  QM_RETURN_IF_ERROR(checks.Matrix("x", x));
  QM_RETURN_IF_ERROR(checks.Expect(weight.rank() == 1, "weight must have one dimension"));
  QM_RETURN_IF_ERROR(checks.Float("weight", weight, weight.shape()));
  QM_RETURN_IF_ERROR(checks.Output("out", out, x.dtype(), x.shape()));
  const int64_t width = weight.dim(0);
  QM_RETURN_IF_ERROR(checks.Expect(width > 0 && x.dim(1) % width == 0, "rows of ", x.dim(1),
                                   " are no multiple of the weight's ", width));
  QM_CUDA_RETURN(LaunchRmsNorm(x.data(), x.dtype(), weight.data(), weight.dtype(), eps,
                               x.elements() / width, width, out->data(), work()));
  return absl::OkStatus();
}

absl::Status CudaBackend::Rope(const Tensor& cosine, const Tensor& sine, int64_t first_position,
                               int64_t length, int64_t head_dim, Tensor* x) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("rope");
  QM_RETURN_IF_ERROR(checks.Expect(x != nullptr, "x is null"));
  QM_RETURN_IF_ERROR(checks.Matrix("x", *x));
  QM_RETURN_IF_ERROR(checks.Output("x", x, x->dtype(), x->shape()));
  QM_RETURN_IF_ERROR(checks.Expect(head_dim >= 2 && head_dim % 2 == 0 && x->dim(1) % head_dim == 0,
                                   "head_dim ", head_dim, " does not fit rows of ", x->dim(1)));
  QM_RETURN_IF_ERROR(checks.Expect(cosine.rank() == 2, "cosine must have two dimensions"));
  const Shape table = {cosine.dim(0), head_dim / 2};
  QM_RETURN_IF_ERROR(checks.Input("cosine", cosine, DType::kF32, table));
  QM_RETURN_IF_ERROR(checks.Input("sine", sine, DType::kF32, table));
  QM_RETURN_IF_ERROR(
      checks.Expect(first_position >= 0 && length >= 1 && first_position + length <= cosine.dim(0),
                    "positions ", first_position, " to ", first_position + length - 1,
                    " are not in tables of ", cosine.dim(0)));
  QM_CUDA_RETURN(LaunchRope(cosine.as<float>(), sine.as<float>(), first_position, length, x->dim(0),
                            x->dim(1) / head_dim, head_dim, x->dtype(), x->data(), work()));
  return absl::OkStatus();
}

absl::Status CudaBackend::Attention(const AttentionShape& shape, const Tensor& q,
                                    const Tensor& keys, const Tensor& values, Tensor* out) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("attention");
  QM_RETURN_IF_ERROR(CheckAttention(checks, shape));
  const Shape q_shape = {shape.batch * shape.query_length, shape.heads * shape.head_dim};
  QM_RETURN_IF_ERROR(checks.Float("q", q, q_shape));
  QM_RETURN_IF_ERROR(checks.Output("out", out, q.dtype(), q_shape));
  if (out->elements() == 0) return absl::OkStatus();
  QM_RETURN_IF_ERROR(checks.Expect(keys.rank() == 2 && keys.dim(0) % shape.batch == 0, "keys ",
                                   keys.shape().ToString(), " do not divide into ", shape.batch,
                                   " sequences"));
  const int64_t capacity = keys.dim(0) / shape.batch;
  const Shape kv_shape = {shape.batch * capacity, shape.kv_heads * shape.head_dim};
  QM_RETURN_IF_ERROR(checks.Input("keys", keys, q.dtype(), kv_shape));
  QM_RETURN_IF_ERROR(checks.Input("values", values, q.dtype(), kv_shape));
  QM_RETURN_IF_ERROR(checks.Expect(capacity >= shape.past_length + shape.query_length, "keys hold ",
                                   capacity, " positions per sequence, and ",
                                   shape.past_length + shape.query_length, " are needed"));

  const int64_t positions = shape.past_length + shape.query_length;
  const AttentionArguments arguments = {
      q.data(),
      keys.data(),
      values.data(),
      out->data(),
      shape.batch,
      shape.query_length,
      shape.past_length,
      capacity,
      static_cast<int>(shape.heads),
      static_cast<int>(shape.kv_heads),
      static_cast<int>(shape.head_dim),
      shape.sliding_window >= positions ? 0 : shape.sliding_window,
      shape.scale};
  if (DecodeAttentionSuits(arguments, q.dtype())) {
    QM_ASSIGN_OR_RETURN(const Tensor scratch,
                        Allocate(DType::kF32, {DecodeAttentionScratch(arguments)}));
    QM_CUDA_RETURN(LaunchDecodeAttention(arguments, q.dtype(), scratch.as<float>(), work()));
  } else if (PrefillAttentionSuits(arguments, q.dtype())) {
    QM_CUDA_RETURN(LaunchPrefillAttention(arguments, q.dtype(), work()));
  } else {
    QM_CUDA_RETURN(LaunchPlainAttention(arguments, q.dtype(), work()));
  }
  return absl::OkStatus();
}

absl::Status CudaBackend::SiluMultiply(const Tensor& gate, const Tensor& up, Tensor* out) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("silu multiply");
  QM_RETURN_IF_ERROR(checks.Float("gate", gate, gate.shape()));
  QM_RETURN_IF_ERROR(checks.Input("up", up, gate.dtype(), gate.shape()));
  QM_RETURN_IF_ERROR(checks.Output("out", out, gate.dtype(), gate.shape()));
  QM_CUDA_RETURN(LaunchSiluMultiply(gate.data(), up.data(), gate.dtype(), gate.elements(),
                                    out->data(), work()));
  return absl::OkStatus();
}

absl::Status CudaBackend::Add(const Tensor& x, Tensor* target) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("add");
  QM_RETURN_IF_ERROR(checks.Float("x", x, x.shape()));
  QM_RETURN_IF_ERROR(checks.Output("target", target, x.dtype(), x.shape()));
  QM_CUDA_RETURN(LaunchAdd(x.data(), x.dtype(), x.elements(), target->data(), work()));
  return absl::OkStatus();
}

}  // namespace quantmill::cuda
