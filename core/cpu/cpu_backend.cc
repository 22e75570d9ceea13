// The CPU backend: checks of arguments, then the kernels of this folder.
#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "core/base/status.h"
#include "core/cpu/attention.h"
#include "core/cpu/checks.h"
#include "core/cpu/convert.h"
#include "core/cpu/draw.h"
#include "core/cpu/elementwise.h"
#include "core/cpu/linalg.h"
#include "core/cpu/linear.h"
#include "core/cpu/moe.h"
#include "core/cpu/norm_rope.h"
#include "core/cpu/scoring.h"
#include "core/cpu/statistics.h"
#include "core/tensor/backend.h"
#include "core/threads/thread_pool.h"

namespace quantmill {
namespace {

using cpu::Expect;
using cpu::ExpectActivation;
using cpu::ExpectIndices;
using cpu::ExpectMatrixView;
using cpu::ExpectOutput;
using cpu::ExpectTensor;
using cpu::ExpectWeight;

// Elements per range of a conversion or fill.
constexpr int64_t kCopyGrain = 1 << 16;

class CpuBackend : public Backend {
 public:
  explicit CpuBackend(int threads) : threads_(threads) {}

  Device device() const override { return Device{}; }
  DType activation_dtype() const override { return DType::kF32; }
  ThreadPool& threads() override { return threads_; }

  // ---- memory ----
  absl::StatusOr<Tensor> Allocate(DType dtype, const Shape& shape) override {
    for (int64_t extent : shape.extents()) {
      QM_RETURN_IF_ERROR(Expect(extent >= 0, "Allocate", "an extent is negative"));
    }
    return Tensor::Host(dtype, shape);
  }
  absl::Status Zero(Tensor* tensor) override;
  absl::Status Copy(const Tensor& source, Tensor* target) override;
  absl::Status CopyPieces(const Tensor& source, int64_t pieces, int64_t begin,
                          Tensor* target) override;
  absl::StatusOr<Tensor> ToDevice(const Tensor& tensor) override {
    QM_RETURN_IF_ERROR(
        Expect(tensor.device().is_cpu(), "ToDevice", "the tensor is not on the host"));
    return tensor;
  }
  absl::Status Synchronize() override { return absl::OkStatus(); }

  // ---- decoder ----
  absl::Status Embed(const Tensor& table, const Tensor& ids, Tensor* out) override;
  absl::Status RmsNorm(const Tensor& x, const Tensor& weight, float eps, Tensor* out) override;
  absl::Status Linear(const Tensor& x, const Tensor& weight, const Tensor& bias,
                      Tensor* out) override;
  absl::Status AddBias(const Tensor& bias, Tensor* x) override;
  absl::Status Rope(const Tensor& cosine, const Tensor& sine, int64_t first_position,
                    int64_t length, int64_t head_dim, Tensor* x) override;
  absl::Status Attention(const AttentionShape& shape, const Tensor& q, const Tensor& keys,
                         const Tensor& values, Tensor* out) override;
  absl::Status SiluMultiply(const Tensor& gate, const Tensor& up, Tensor* out) override;
  absl::Status Add(const Tensor& x, Tensor* target) override;

  // ---- mixture of experts ----
  absl::Status RouteTopK(const Tensor& router_logits, int64_t top_k, bool normalize,
                         Tensor* experts_out, Tensor* weights_out) override;
  absl::Status GatherRows(const Tensor& x, const Tensor& rows, Tensor* out) override;
  absl::Status ScatterAddRows(const Tensor& x, const Tensor& rows, const Tensor& weights,
                              Tensor* target) override;

  // ---- statistics ----
  absl::Status AccumulateGram(const Tensor& x, Tensor* gram) override;
  absl::Status AccumulateCross(const Tensor& x_original, const Tensor& x, Tensor* cross) override;
  absl::Status AccumulateAbs(const Tensor& x, Tensor* sum, Tensor* maximum) override;

  // ---- scoring ----
  absl::Status ScoreRows(const Tensor& logits, const Tensor& targets, Tensor* nll,
                         Tensor* argmax) override;
  absl::Status KlRows(const Tensor& reference, const Tensor& logits, Tensor* kl) override;
  absl::Status DrawRows(const Tensor& logits, const Tensor& excluded, const Tensor& uniforms,
                        Tensor* tokens) override;

  // ---- linear algebra ----
  absl::Status Gemm(bool trans_a, bool trans_b, double alpha, const qm_tensor& a,
                    const qm_tensor& b, double beta, const qm_tensor& c) override;
  absl::Status InverseCholesky(const qm_tensor& h, double damp, const qm_tensor& out) override;

 private:
  ThreadPool threads_;
};

// ---- memory -------------------------------------------------------------------------------------

absl::Status CpuBackend::Zero(Tensor* tensor) {
  QM_RETURN_IF_ERROR(Expect(tensor != nullptr, "Zero", "the tensor is null"));
  QM_RETURN_IF_ERROR(ExpectOutput("Zero", "tensor", tensor, tensor->dtype(), tensor->shape()));
  std::memset(tensor->data(), 0, static_cast<size_t>(tensor->bytes()));
  return absl::OkStatus();
}

// Converts n elements through f32, which holds every F16 and BF16 exactly.
void ConvertRange(const void* source, DType from, void* target, DType to, int64_t n) {
  if (to == DType::kF32) {
    cpu::ToF32(source, from, n, static_cast<float*>(target));
  } else if (from == DType::kF32) {
    cpu::FromF32(static_cast<const float*>(source), n, to, target);
  } else {
    std::vector<float> values(static_cast<size_t>(n));
    cpu::ToF32(source, from, n, values.data());
    cpu::FromF32(values.data(), n, to, target);
  }
}

absl::Status CpuBackend::Copy(const Tensor& source, Tensor* target) {
  constexpr char kOp[] = "Copy";
  QM_RETURN_IF_ERROR(Expect(target != nullptr, kOp, "target is null"));
  QM_RETURN_IF_ERROR(ExpectTensor(kOp, "source", source, source.dtype(), source.shape()));
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "target", target, target->dtype(), target->shape()));
  QM_RETURN_IF_ERROR(Expect(source.elements() == target->elements(), kOp, "source has shape ",
                            source.shape().ToString(), ", target ", target->shape().ToString(),
                            "; both must hold equally many elements"));
  if (source.dtype() == target->dtype()) {
    if (source.elements() == 0) return absl::OkStatus();
    std::memmove(target->data(), source.data(), static_cast<size_t>(source.bytes()));
    return absl::OkStatus();
  }
  QM_RETURN_IF_ERROR(Expect(IsModelFloat(source.dtype()) && IsModelFloat(target->dtype()), kOp,
                            "cannot convert ", AbslView(DTypeName(source.dtype())), " to ",
                            AbslView(DTypeName(target->dtype())),
                            "; only F32, F16 and BF16 are converted"));
  threads_.ParallelFor(source.elements(), kCopyGrain, [&](int64_t begin, int64_t end, int) {
    ConvertRange(cpu::ElementAddress(source.data(), source.dtype(), begin), source.dtype(),
                 static_cast<char*>(target->data()) + begin * ElementSize(target->dtype()),
                 target->dtype(), end - begin);
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::CopyPieces(const Tensor& source, int64_t pieces, int64_t begin,
                                    Tensor* target) {
  constexpr char kOp[] = "CopyPieces";
  QM_RETURN_IF_ERROR(Expect(target != nullptr, kOp, "target is null"));
  QM_RETURN_IF_ERROR(ExpectTensor(kOp, "source", source, source.dtype(), source.shape()));
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "target", target, source.dtype(), target->shape()));
  QM_RETURN_IF_ERROR(Expect(PiecesFit(source, pieces, begin, *target), kOp, pieces, " pieces of ",
                            source.shape().ToString(), " do not fit ", target->shape().ToString(),
                            " from row ", begin, " of each on"));
  const int64_t bytes = source.bytes() / pieces, stride = target->bytes() / pieces;
  const int64_t offset = begin * target->dim(1) * ElementSize(target->dtype());
  for (int64_t piece = 0; piece < pieces; ++piece) {
    std::memcpy(static_cast<char*>(target->data()) + piece * stride + offset,
                static_cast<const char*>(source.data()) + piece * bytes,
                static_cast<size_t>(bytes));
  }
  return absl::OkStatus();
}

// ---- decoder ------------------------------------------------------------------------------------

absl::Status CpuBackend::Embed(const Tensor& table, const Tensor& ids, Tensor* out) {
  constexpr char kOp[] = "Embed";
  QM_RETURN_IF_ERROR(Expect(table.rank() == 2, kOp, "table must have rank 2"));
  const int64_t vocab = table.dim(0), width = table.dim(1);
  QM_RETURN_IF_ERROR(ExpectWeight(kOp, "table", table, table.shape()));
  const int64_t rows = ids.elements();
  QM_RETURN_IF_ERROR(ExpectTensor(kOp, "ids", ids, DType::kI32, {rows}));
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "out", out, DType::kF32, {rows, width}));
  QM_RETURN_IF_ERROR(ExpectIndices(kOp, "ids", ids, vocab));
  for (int64_t i = 0; i < rows; ++i) {
    cpu::ToF32(cpu::ElementAddress(table.data(), table.dtype(), ids.as<int32_t>()[i] * width),
               table.dtype(), width, out->as<float>() + i * width);
  }
  return absl::OkStatus();
}

absl::Status CpuBackend::RmsNorm(const Tensor& x, const Tensor& weight, float eps, Tensor* out) {
  constexpr char kOp[] = "RmsNorm";
  QM_RETURN_IF_ERROR(ExpectActivation(kOp, "x", x));
  const int64_t width = weight.elements();
  QM_RETURN_IF_ERROR(ExpectWeight(kOp, "weight", weight, {width}));
  QM_RETURN_IF_ERROR(Expect(width > 0 && x.dim(1) % width == 0, kOp, "x has ", x.dim(1),
                            " features, which weight's ", width, " elements do not divide"));
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "out", out, DType::kF32, x.shape()));
  const std::vector<float> scale = cpu::F32Values(weight);
  cpu::RmsNorm(threads_, x.as<float>(), x.elements() / width, width, scale.data(), eps,
               out->as<float>());
  return absl::OkStatus();
}

absl::Status CpuBackend::Linear(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                Tensor* out) {
  constexpr char kOp[] = "Linear";
  QM_RETURN_IF_ERROR(ExpectActivation(kOp, "x", x));
  QM_RETURN_IF_ERROR(Expect(weight.rank() == 2, kOp, "weight must have rank 2"));
  const int64_t rows = x.dim(0), k = x.dim(1), n = weight.dim(0);
  QM_RETURN_IF_ERROR(ExpectWeight(kOp, "weight", weight, {n, k}));
  if (!bias.empty()) QM_RETURN_IF_ERROR(ExpectWeight(kOp, "bias", bias, {n}));
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "out", out, DType::kF32, {rows, n}));
  const std::vector<float> bias_values = bias.empty() ? std::vector<float>() : cpu::F32Values(bias);
  cpu::Linear(threads_, x.as<float>(), rows, k, weight.data(), weight.dtype(), n,
              bias.empty() ? nullptr : bias_values.data(), out->as<float>());
  return absl::OkStatus();
}

absl::Status CpuBackend::AddBias(const Tensor& bias, Tensor* x) {
  constexpr char kOp[] = "AddBias";
  QM_RETURN_IF_ERROR(Expect(x != nullptr, kOp, "x is null"));
  QM_RETURN_IF_ERROR(ExpectActivation(kOp, "x", *x));
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "x", x, DType::kF32, x->shape()));
  QM_RETURN_IF_ERROR(ExpectWeight(kOp, "bias", bias, {x->dim(1)}));
  const std::vector<float> values = cpu::F32Values(bias);
  cpu::AddBias(threads_, values.data(), x->dim(0), x->dim(1), x->as<float>());
  return absl::OkStatus();
}

absl::Status CpuBackend::Rope(const Tensor& cosine, const Tensor& sine, int64_t first_position,
                              int64_t length, int64_t head_dim, Tensor* x) {
  constexpr char kOp[] = "Rope";
  QM_RETURN_IF_ERROR(Expect(x != nullptr, kOp, "x is null"));
  QM_RETURN_IF_ERROR(ExpectActivation(kOp, "x", *x));
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "x", x, DType::kF32, x->shape()));
  QM_RETURN_IF_ERROR(Expect(head_dim > 0 && head_dim % 2 == 0 && x->dim(1) % head_dim == 0, kOp,
                            "head_dim ", head_dim, " must be even and divide the features of x, ",
                            x->dim(1)));
  if (x->dim(0) == 0) return absl::OkStatus();
  QM_RETURN_IF_ERROR(Expect(length > 0 && x->dim(0) % length == 0, kOp, "length ", length,
                            " must divide the rows of x, ", x->dim(0)));
  QM_RETURN_IF_ERROR(Expect(cosine.rank() == 2, kOp, "cosine must have rank 2"));
  const int64_t positions = cosine.dim(0);
  QM_RETURN_IF_ERROR(ExpectTensor(kOp, "cosine", cosine, DType::kF32, {positions, head_dim / 2}));
  QM_RETURN_IF_ERROR(ExpectTensor(kOp, "sine", sine, DType::kF32, {positions, head_dim / 2}));
  QM_RETURN_IF_ERROR(Expect(first_position >= 0 && first_position + length <= positions, kOp,
                            "positions ", first_position, " to ", first_position + length - 1,
                            " are outside the tables of ", positions, " positions"));
  cpu::Rope(threads_, cosine.as<float>(), sine.as<float>(),
            {x->dim(0), x->dim(1) / head_dim, head_dim, first_position, length}, x->as<float>());
  return absl::OkStatus();
}

absl::Status CheckAttentionShape(const AttentionShape& s) {
  constexpr char kOp[] = "Attention";
  QM_RETURN_IF_ERROR(Expect(s.batch > 0 && s.query_length >= 0 && s.past_length >= 0, kOp,
                            "batch must be positive, lengths not negative"));
  QM_RETURN_IF_ERROR(Expect(s.kv_heads > 0 && s.heads > 0 && s.heads % s.kv_heads == 0, kOp,
                            "kv_heads ", s.kv_heads, " must divide heads ", s.heads));
  QM_RETURN_IF_ERROR(Expect(s.head_dim > 0, kOp, "head_dim must be positive"));
  return Expect(s.sliding_window >= 0, kOp, "sliding_window must not be negative");
}

absl::Status CpuBackend::Attention(const AttentionShape& shape, const Tensor& q, const Tensor& keys,
                                   const Tensor& values, Tensor* out) {
  constexpr char kOp[] = "Attention";
  QM_RETURN_IF_ERROR(CheckAttentionShape(shape));
  const Shape q_shape = {shape.batch * shape.query_length, shape.heads * shape.head_dim};
  QM_RETURN_IF_ERROR(ExpectTensor(kOp, "q", q, DType::kF32, q_shape));
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "out", out, DType::kF32, q_shape));
  QM_RETURN_IF_ERROR(Expect(keys.rank() == 2 && keys.dim(0) % shape.batch == 0, kOp,
                            "batch must divide the rows of keys"));
  const int64_t capacity = keys.dim(0) / shape.batch;
  const Shape kv_shape = {keys.dim(0), shape.kv_heads * shape.head_dim};
  QM_RETURN_IF_ERROR(ExpectTensor(kOp, "keys", keys, DType::kF32, kv_shape));
  QM_RETURN_IF_ERROR(ExpectTensor(kOp, "values", values, DType::kF32, kv_shape));
  QM_RETURN_IF_ERROR(Expect(capacity >= shape.past_length + shape.query_length, kOp, "keys hold ",
                            capacity, " positions per sequence, but ", shape.past_length,
                            " past and ", shape.query_length, " new ones are needed"));
  cpu::Attention(threads_, shape, capacity, q.as<float>(), keys.as<float>(), values.as<float>(),
                 out->as<float>());
  return absl::OkStatus();
}

absl::Status CpuBackend::SiluMultiply(const Tensor& gate, const Tensor& up, Tensor* out) {
  constexpr char kOp[] = "SiluMultiply";
  QM_RETURN_IF_ERROR(ExpectTensor(kOp, "gate", gate, DType::kF32, gate.shape()));
  QM_RETURN_IF_ERROR(ExpectTensor(kOp, "up", up, DType::kF32, gate.shape()));
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "out", out, DType::kF32, gate.shape()));
  cpu::SiluMultiply(threads_, gate.as<float>(), up.as<float>(), gate.elements(), out->as<float>());
  return absl::OkStatus();
}

absl::Status CpuBackend::Add(const Tensor& x, Tensor* target) {
  constexpr char kOp[] = "Add";
  QM_RETURN_IF_ERROR(ExpectTensor(kOp, "x", x, DType::kF32, x.shape()));
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "target", target, DType::kF32, x.shape()));
  cpu::Add(threads_, x.as<float>(), x.elements(), target->as<float>());
  return absl::OkStatus();
}

// ---- mixture of experts -------------------------------------------------------------------------

absl::Status CpuBackend::RouteTopK(const Tensor& router_logits, int64_t top_k, bool normalize,
                                   Tensor* experts_out, Tensor* weights_out) {
  constexpr char kOp[] = "RouteTopK";
  QM_RETURN_IF_ERROR(ExpectActivation(kOp, "router_logits", router_logits));
  const int64_t rows = router_logits.dim(0), experts = router_logits.dim(1);
  QM_RETURN_IF_ERROR(
      Expect(top_k > 0 && top_k <= experts, kOp, "top_k is ", top_k, ", expected 1 to ", experts));
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "experts_out", experts_out, DType::kI32, {rows, top_k}));
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "weights_out", weights_out, DType::kF32, {rows, top_k}));
  cpu::RouteTopK(threads_, router_logits.as<float>(), rows, experts, top_k, normalize,
                 experts_out->as<int32_t>(), weights_out->as<float>());
  return absl::OkStatus();
}

absl::Status CpuBackend::GatherRows(const Tensor& x, const Tensor& rows, Tensor* out) {
  constexpr char kOp[] = "GatherRows";
  QM_RETURN_IF_ERROR(ExpectActivation(kOp, "x", x));
  const int64_t n = rows.elements();
  QM_RETURN_IF_ERROR(ExpectTensor(kOp, "rows", rows, DType::kI32, {n}));
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "out", out, DType::kF32, {n, x.dim(1)}));
  QM_RETURN_IF_ERROR(ExpectIndices(kOp, "rows", rows, x.dim(0)));
  cpu::GatherRows(threads_, x.as<float>(), rows.as<int32_t>(), n, x.dim(1), out->as<float>());
  return absl::OkStatus();
}

absl::Status CpuBackend::ScatterAddRows(const Tensor& x, const Tensor& rows, const Tensor& weights,
                                        Tensor* target) {
  constexpr char kOp[] = "ScatterAddRows";
  QM_RETURN_IF_ERROR(ExpectActivation(kOp, "x", x));
  QM_RETURN_IF_ERROR(Expect(target != nullptr, kOp, "target is null"));
  QM_RETURN_IF_ERROR(ExpectActivation(kOp, "target", *target));
  const int64_t n = x.dim(0), width = x.dim(1);
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "target", target, DType::kF32, {target->dim(0), width}));
  QM_RETURN_IF_ERROR(ExpectTensor(kOp, "rows", rows, DType::kI32, {n}));
  QM_RETURN_IF_ERROR(ExpectTensor(kOp, "weights", weights, DType::kF32, {n}));
  QM_RETURN_IF_ERROR(ExpectIndices(kOp, "rows", rows, target->dim(0)));
  cpu::ScatterAddRows(threads_, x.as<float>(), rows.as<int32_t>(), weights.as<float>(), n, width,
                      target->as<float>());
  return absl::OkStatus();
}

// ---- statistics ---------------------------------------------------------------------------------

absl::Status CpuBackend::AccumulateGram(const Tensor& x, Tensor* gram) {
  constexpr char kOp[] = "AccumulateGram";
  QM_RETURN_IF_ERROR(ExpectActivation(kOp, "x", x));
  const int64_t k = x.dim(1);
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "gram", gram, DType::kF32, {k, k}));
  cpu::AccumulateGram(threads_, x.as<float>(), x.dim(0), k, gram->as<float>());
  return absl::OkStatus();
}

absl::Status CpuBackend::AccumulateCross(const Tensor& x_original, const Tensor& x, Tensor* cross) {
  constexpr char kOp[] = "AccumulateCross";
  QM_RETURN_IF_ERROR(ExpectActivation(kOp, "x", x));
  const int64_t k = x.dim(1);
  QM_RETURN_IF_ERROR(ExpectTensor(kOp, "x_original", x_original, DType::kF32, x.shape()));
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "cross", cross, DType::kF32, {k, k}));
  cpu::AccumulateCross(threads_, x_original.as<float>(), x.as<float>(), x.dim(0), k,
                       cross->as<float>());
  return absl::OkStatus();
}

absl::Status CpuBackend::AccumulateAbs(const Tensor& x, Tensor* sum, Tensor* maximum) {
  constexpr char kOp[] = "AccumulateAbs";
  QM_RETURN_IF_ERROR(ExpectActivation(kOp, "x", x));
  const int64_t k = x.dim(1);
  if (sum) QM_RETURN_IF_ERROR(ExpectOutput(kOp, "sum", sum, DType::kF32, {k}));
  if (maximum) QM_RETURN_IF_ERROR(ExpectOutput(kOp, "maximum", maximum, DType::kF32, {k}));
  cpu::AccumulateAbs(threads_, x.as<float>(), x.dim(0), k, sum ? sum->as<float>() : nullptr,
                     maximum ? maximum->as<float>() : nullptr);
  return absl::OkStatus();
}

// ---- scoring ------------------------------------------------------------------------------------

absl::Status CpuBackend::ScoreRows(const Tensor& logits, const Tensor& targets, Tensor* nll,
                                   Tensor* argmax) {
  constexpr char kOp[] = "ScoreRows";
  QM_RETURN_IF_ERROR(ExpectActivation(kOp, "logits", logits));
  const int64_t rows = logits.dim(0), vocab = logits.dim(1);
  QM_RETURN_IF_ERROR(Expect(vocab > 0, kOp, "logits have no columns"));
  QM_RETURN_IF_ERROR(ExpectTensor(kOp, "targets", targets, DType::kI32, {rows}));
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "nll", nll, DType::kF32, {rows}));
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "argmax", argmax, DType::kI32, {rows}));
  QM_RETURN_IF_ERROR(ExpectIndices(kOp, "targets", targets, vocab));
  cpu::ScoreRows(threads_, logits.as<float>(), rows, vocab, targets.as<int32_t>(), nll->as<float>(),
                 argmax->as<int32_t>());
  return absl::OkStatus();
}

absl::Status CpuBackend::KlRows(const Tensor& reference, const Tensor& logits, Tensor* kl) {
  constexpr char kOp[] = "KlRows";
  QM_RETURN_IF_ERROR(ExpectActivation(kOp, "logits", logits));
  QM_RETURN_IF_ERROR(Expect(logits.dim(1) > 0, kOp, "logits have no columns"));
  QM_RETURN_IF_ERROR(ExpectTensor(kOp, "reference", reference, DType::kF32, logits.shape()));
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "kl", kl, DType::kF32, {logits.dim(0)}));
  cpu::KlRows(threads_, reference.as<float>(), logits.as<float>(), logits.dim(0), logits.dim(1),
              kl->as<float>());
  return absl::OkStatus();
}

absl::Status CpuBackend::DrawRows(const Tensor& logits, const Tensor& excluded,
                                  const Tensor& uniforms, Tensor* tokens) {
  constexpr char kOp[] = "DrawRows";
  QM_RETURN_IF_ERROR(ExpectActivation(kOp, "logits", logits));
  const int64_t rows = logits.dim(0), vocab = logits.dim(1);
  QM_RETURN_IF_ERROR(Expect(vocab > 0, kOp, "logits have no columns"));
  QM_RETURN_IF_ERROR(
      ExpectTensor(kOp, "excluded", excluded, DType::kI32, Shape({excluded.elements()})));
  QM_RETURN_IF_ERROR(ExpectTensor(kOp, "uniforms", uniforms, DType::kF64, {rows}));
  QM_RETURN_IF_ERROR(ExpectOutput(kOp, "tokens", tokens, DType::kI32, {rows}));
  cpu::DrawRows(threads_, logits.as<float>(), rows, vocab,
                {excluded.as<int32_t>(), static_cast<size_t>(excluded.elements())},
                uniforms.as<double>(), tokens->as<int32_t>());
  return AllDrawn(*tokens);
}

// ---- linear algebra -----------------------------------------------------------------------------

// A view as f32: itself, or a copy that `copy` holds.
absl::StatusOr<cpu::MatrixView<float>> F32View(const qm_tensor& view, Tensor& copy) {
  const DType dtype = static_cast<DType>(view.dtype);
  const int64_t rows = view.shape[0], width = view.shape[1], stride = cpu::RowStride(view);
  if (dtype == DType::kF32) {
    return cpu::MatrixView<float>{static_cast<float*>(view.data), rows, width, stride};
  }
  QM_ASSIGN_OR_RETURN(copy, Tensor::Host(DType::kF32, {rows, width}));
  for (int64_t row = 0; row < rows; ++row) {
    cpu::ToF32(cpu::ElementAddress(view.data, dtype, row * stride), dtype, width,
               copy.as<float>() + row * width);
  }
  return cpu::MatrixView<float>{copy.as<float>(), rows, width, std::max<int64_t>(1, width)};
}

absl::Status CheckGemm(bool trans_a, bool trans_b, const qm_tensor& a, const qm_tensor& b,
                       const qm_tensor& c) {
  constexpr char kOp[] = "Gemm";
  const auto kModelFloats = {DType::kF32, DType::kF16, DType::kBF16};
  QM_RETURN_IF_ERROR(ExpectMatrixView(kOp, "a", a, kModelFloats));
  QM_RETURN_IF_ERROR(ExpectMatrixView(kOp, "b", b, kModelFloats));
  QM_RETURN_IF_ERROR(ExpectMatrixView(kOp, "c", c, kModelFloats));
  QM_RETURN_IF_ERROR(Expect(!(c.flags & QM_TENSOR_READONLY), kOp, "c is read-only"));
  QM_RETURN_IF_ERROR(Expect(a.dtype == b.dtype, kOp, "a and b have different dtypes"));
  QM_RETURN_IF_ERROR(Expect(c.dtype == a.dtype || c.dtype == QM_F32, kOp,
                            "c must be F32 or of the dtype of a and b"));
  const int64_t m = a.shape[trans_a ? 1 : 0], k = a.shape[trans_a ? 0 : 1];
  const int64_t k_b = b.shape[trans_b ? 1 : 0], n = b.shape[trans_b ? 0 : 1];
  return Expect(k == k_b && c.shape[0] == m && c.shape[1] == n, kOp, "op(a) is ", m, " x ", k,
                ", op(b) is ", k_b, " x ", n, ", c is ", c.shape[0], " x ", c.shape[1]);
}

absl::Status CpuBackend::Gemm(bool trans_a, bool trans_b, double alpha, const qm_tensor& a,
                              const qm_tensor& b, double beta, const qm_tensor& c) {
  QM_RETURN_IF_ERROR(CheckGemm(trans_a, trans_b, a, b, c));
  if (c.shape[0] == 0 || c.shape[1] == 0) return absl::OkStatus();
  Tensor a_copy, b_copy, c_copy;
  QM_ASSIGN_OR_RETURN(const cpu::MatrixView<float> left, F32View(a, a_copy));
  QM_ASSIGN_OR_RETURN(const cpu::MatrixView<float> right, F32View(b, b_copy));
  QM_ASSIGN_OR_RETURN(const cpu::MatrixView<float> target, F32View(c, c_copy));
  cpu::Gemm(threads_, trans_a, trans_b, static_cast<float>(alpha),
            {left.data, left.rows, left.columns, left.stride},
            {right.data, right.rows, right.columns, right.stride}, static_cast<float>(beta),
            target);
  const DType dtype = static_cast<DType>(c.dtype);
  if (dtype == DType::kF32) return absl::OkStatus();
  for (int64_t row = 0; row < target.rows; ++row) {
    cpu::FromF32(target.data + row * target.stride, target.columns, dtype,
                 static_cast<char*>(c.data) + row * cpu::RowStride(c) * ElementSize(dtype));
  }
  return absl::OkStatus();
}

absl::Status CpuBackend::InverseCholesky(const qm_tensor& h, double damp, const qm_tensor& out) {
  constexpr char kOp[] = "InverseCholesky";
  QM_RETURN_IF_ERROR(ExpectMatrixView(kOp, "h", h, {DType::kF32}));
  QM_RETURN_IF_ERROR(ExpectMatrixView(kOp, "out", out, {DType::kF32}));
  const int64_t n = h.shape[0];
  QM_RETURN_IF_ERROR(Expect(h.shape[1] == n && out.shape[0] == n && out.shape[1] == n, kOp,
                            "h and out must be square matrices of one size"));
  QM_RETURN_IF_ERROR(Expect(!(out.flags & QM_TENSOR_READONLY), kOp, "out is read-only"));
  QM_RETURN_IF_ERROR(Expect(std::isfinite(damp) && damp >= 0, kOp, "damp is ", damp,
                            ", expected a finite number >= 0"));
  return cpu::InverseCholesky(threads_,
                              {static_cast<const float*>(h.data), n, n, cpu::RowStride(h)}, damp,
                              {static_cast<float*>(out.data), n, n, cpu::RowStride(out)});
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(int threads) {
  QM_RETURN_IF_ERROR(Expect(threads >= 0, "backend", "threads is ", threads,
                            ", expected 0 (one per core) or more"));
  // Parallelism is over fixed tiles; a gemm that splits itself would depend on the thread count.
  openblas_set_num_threads(1);
  return std::make_unique<CpuBackend>(threads);
}

}  // namespace quantmill
