#include <cuda_runtime_api.h>

#include <algorithm>
#include <vector>

#include "core/base/status.h"
#include "core/cuda/cuda_status.h"
#include "core/train/attention_backward.cuh"
#include "core/train/backward_kernels.cuh"
#include "core/train/device_ops.h"

namespace quantmill {
namespace {

// Queries of one tile of attention: a tile of scores of 2048 keys is 8 MiB, its products are large
// enough for the tensor cores, and half of the masked triangle is never computed.
constexpr int64_t kTileQueries = 1024;

// Rows [begin, end) and columns [column, column + width) of a matrix.
qm_tensor Part(const Tensor& matrix, int64_t begin, int64_t end, int64_t column, int64_t width) {
  qm_tensor view = matrix.View();
  const int64_t stride = matrix.dim(1);
  view.data =
      static_cast<char*>(view.data) + (begin * stride + column) * ElementSize(matrix.dtype());
  view.shape[0] = end - begin;
  view.shape[1] = width;
  view.stride[0] = stride;
  view.stride[1] = 1;
  return view;
}

class CudaTrainingOps final : public TrainingOps {
 public:
  using TrainingOps::TrainingOps;

 private:
  cudaStream_t stream() const { return static_cast<cudaStream_t>(backend().stream()); }
  absl::Status Enter() const {
    QM_CUDA_RETURN(cudaSetDevice(backend().device().index));
    return absl::OkStatus();
  }

  absl::Status DoBiasGradient(const Tensor& d_y, Tensor* d_bias) override {
    QM_RETURN_IF_ERROR(Enter());
    const int64_t rows = d_y.dim(0), columns = d_y.dim(1);
    QM_ASSIGN_OR_RETURN(const Tensor partial, Partials(rows, columns));
    QM_CUDA_RETURN(cuda::LaunchColumnSums(d_y.as<float>(), rows, columns, partial.as<float>(),
                                          d_bias->as<float>(), stream()));
    return absl::OkStatus();
  }

  absl::StatusOr<Tensor> Partials(int64_t rows, int64_t columns) {
    return backend().Allocate(DType::kF32, {cuda::ColumnPartials(rows, columns)});
  }

  absl::Status DoRmsNorm(const Tensor& x, const Tensor& weight, float eps, const Tensor& d_y,
                         bool add, Tensor* d_x, Tensor* d_weight) override {
    QM_RETURN_IF_ERROR(Enter());
    const int64_t width = weight.dim(0), runs = x.elements() / width;
    // First, since d_x may take the place of d_y.
    if (d_weight != nullptr) {
      QM_ASSIGN_OR_RETURN(const Tensor scale, backend().Allocate(DType::kF32, {runs}));
      QM_ASSIGN_OR_RETURN(const Tensor partial, Partials(runs, width));
      QM_CUDA_RETURN(cuda::LaunchInverseRms(x.data(), x.dtype(), runs, width, eps,
                                            scale.as<float>(), stream()));
      QM_CUDA_RETURN(cuda::LaunchScaledColumnSums(
          d_y.as<float>(), x.data(), x.dtype(), scale.as<float>(), runs, width, partial.as<float>(),
          d_weight->as<float>(), stream()));
    }
    QM_CUDA_RETURN(
        cuda::LaunchNormBackward({x.data(), x.dtype(), weight.data(), weight.dtype(),
                                  d_y.as<float>(), d_x->as<float>(), runs, width, eps, add},
                                 stream()));
    return absl::OkStatus();
  }

  absl::Status DoRope(const RopeRows& shape, Tensor* d_x) override {
    QM_RETURN_IF_ERROR(Enter());
    QM_CUDA_RETURN(cuda::LaunchRopeBackward(
        shape.cosine.as<float>(), shape.sine.as<float>(), shape.first_position, shape.length,
        d_x->dim(0), d_x->dim(1) / shape.head_dim, shape.head_dim, d_x->as<float>(), stream()));
    return absl::OkStatus();
  }

  absl::Status DoAttention(const AttentionShape& shape, const Tensor& q, const Tensor& keys,
                           const Tensor& values, const Tensor& d_out, Tensor* d_q, Tensor* d_keys,
                           Tensor* d_values) override {
    QM_RETURN_IF_ERROR(Enter());
    QM_ASSIGN_OR_RETURN(const Tensor d_factor, AsFactor(d_out));
    const int64_t queries = shape.batch * shape.heads * shape.query_length;
    cuda::AttentionBackward fused = {};
    fused.q = q.data();
    fused.keys = keys.data();
    fused.values = values.data();
    fused.d_out = d_factor.data();
    fused.d_q = d_q->as<float>();
    fused.d_keys = d_keys->as<float>();
    fused.d_values = d_values->as<float>();
    fused.batch = shape.batch;
    fused.length = shape.query_length;
    fused.heads = static_cast<int>(shape.heads);
    fused.kv_heads = static_cast<int>(shape.kv_heads);
    fused.head_dim = static_cast<int>(shape.head_dim);
    fused.window = shape.sliding_window;
    fused.scale = shape.scale;
    if (cuda::AttentionBackwardSuits(fused, q.dtype())) {
      QM_ASSIGN_OR_RETURN(const Tensor statistics, backend().Allocate(DType::kF32, {2, queries}));
      fused.statistics = statistics.as<float>();
      QM_CUDA_RETURN(cuda::LaunchAttentionBackward(fused, q.dtype(), stream()));
      return absl::OkStatus();
    }
    return AttentionByProducts(shape, q, keys, values, d_factor, d_q, d_keys, d_values);
  }

  // Any dtype and head_dim: matrix products and softmaxes of tiles of one head after the other.
  absl::Status AttentionByProducts(const AttentionShape& shape, const Tensor& q, const Tensor& keys,
                                   const Tensor& values, const Tensor& d_factor, Tensor* d_q,
                                   Tensor* d_keys, Tensor* d_values) {
    QM_RETURN_IF_ERROR(backend().Zero(d_keys));
    QM_RETURN_IF_ERROR(backend().Zero(d_values));
    const Shape tile = {std::min(kTileQueries, shape.query_length), shape.query_length};
    QM_ASSIGN_OR_RETURN(const Tensor scores, backend().Allocate(DType::kF32, tile));
    QM_ASSIGN_OR_RETURN(const Tensor p, backend().Allocate(backend().activation_dtype(), tile));
    const Operands operands = {q, keys, values, d_factor, *d_q, *d_keys, *d_values, scores, p};
    for (int64_t sequence = 0; sequence < shape.batch; ++sequence) {
      // Heads that share keys add to the same sums, in order.
      for (int64_t head = 0; head < shape.heads; ++head) {
        for (int64_t first = 0; first < shape.query_length; first += kTileQueries) {
          QM_RETURN_IF_ERROR(AttentionTile(shape, operands, sequence, head, first));
        }
      }
    }
    return absl::OkStatus();
  }

  struct Operands {
    const Tensor &q, &keys, &values, &d_out;
    const Tensor &d_q, &d_keys, &d_values;
    const Tensor &scores, &p;  // scratch of one tile
  };

  // With P = softmax(S), S = scale q k^T + mask, out = P v:
  //   d_v += P^T d_out,  d_P = d_out v^T,  d_S = P (d_P - rowsum(P d_P)),
  //   d_q = scale d_S k,  d_k += scale d_S^T q.
  absl::Status AttentionTile(const AttentionShape& shape, const Operands& o, int64_t sequence,
                             int64_t head, int64_t first) {
    const int64_t dim = shape.head_dim, window = shape.sliding_window;
    const int64_t rows = std::min(kTileQueries, shape.query_length - first);
    const int64_t key = window > 0 ? std::max<int64_t>(0, first - window + 1) : 0;
    const int64_t count = first + rows - key;
    const int64_t start = sequence * shape.query_length;
    const int64_t column = head * dim, pair = head / (shape.heads / shape.kv_heads) * dim;
    const auto queries = [&](const Tensor& tensor) {
      return Part(tensor, start + first, start + first + rows, column, dim);
    };
    const auto pairs = [&](const Tensor& tensor) {
      return Part(tensor, start + key, start + key + count, pair, dim);
    };
    // Scratch is used as a dense [rows, count] matrix.
    const Shape dense = {rows, count};
    const qm_tensor scores = Dense(o.scores, dense), p = Dense(o.p, dense);
    const cuda::ScoreTile tile = {rows, count, first, key, window};
    Backend& b = backend();
    QM_RETURN_IF_ERROR(b.Gemm(false, true, shape.scale, queries(o.q), pairs(o.keys), 0, scores));
    QM_CUDA_RETURN(
        cuda::LaunchSoftmaxRows(tile, o.scores.as<float>(), o.p.dtype(), o.p.data(), stream()));
    QM_RETURN_IF_ERROR(b.Gemm(true, false, 1, p, queries(o.d_out), 1, pairs(o.d_values)));
    QM_RETURN_IF_ERROR(b.Gemm(false, true, 1, queries(o.d_out), pairs(o.values), 0, scores));
    QM_CUDA_RETURN(
        cuda::LaunchSoftmaxBackward(tile, o.scores.as<float>(), o.p.dtype(), o.p.data(), stream()));
    QM_RETURN_IF_ERROR(b.Gemm(false, false, shape.scale, p, pairs(o.keys), 0, queries(o.d_q)));
    return b.Gemm(true, false, shape.scale, p, queries(o.q), 1, pairs(o.d_keys));
  }

  static qm_tensor Dense(const Tensor& scratch, const Shape& shape) {
    qm_tensor view = scratch.View();
    view.shape[0] = shape[0];
    view.shape[1] = shape[1];
    view.stride[0] = shape[1];
    view.stride[1] = 1;
    return view;
  }

  absl::Status DoSiluMultiply(const Tensor& gate, const Tensor& up, const Tensor& d_y,
                              Tensor* d_gate, Tensor* d_up) override {
    QM_RETURN_IF_ERROR(Enter());
    QM_CUDA_RETURN(cuda::LaunchSiluBackward(gate.data(), up.data(), gate.dtype(), d_y.as<float>(),
                                            gate.elements(), d_gate->as<float>(), d_up->as<float>(),
                                            stream()));
    return absl::OkStatus();
  }

  absl::Status DoAdd(const Tensor& x, Tensor* target) override {
    QM_RETURN_IF_ERROR(Enter());
    QM_CUDA_RETURN(cuda::LaunchAddF32(x.as<float>(), x.elements(), target->as<float>(), stream()));
    return absl::OkStatus();
  }

  absl::Status DoDifference(const Tensor& y, const Tensor& target, Tensor* d_y) override {
    QM_RETURN_IF_ERROR(Enter());
    QM_CUDA_RETURN(cuda::LaunchDifference(y.data(), target.data(), y.dtype(), y.elements(),
                                          d_y->as<float>(), stream()));
    return absl::OkStatus();
  }

  absl::Status DoScale(float scale, Tensor* x) override {
    QM_RETURN_IF_ERROR(Enter());
    QM_CUDA_RETURN(cuda::LaunchScaleF32(scale, x->elements(), x->as<float>(), stream()));
    return absl::OkStatus();
  }

  absl::Status DoTokenLosses(const Tensor& targets, const Tensor& teacher, const TokenLoss& weights,
                             float scale, Tensor* logits, Tensor* losses) override {
    QM_RETURN_IF_ERROR(Enter());
    cuda::TokenLossRows rows = {};
    rows.logits = logits->as<float>();
    rows.targets = targets.as<int32_t>();
    rows.teacher = teacher.empty() ? nullptr : teacher.data();
    rows.teacher_dtype = teacher.empty() ? DType::kF32 : teacher.dtype();
    rows.losses = losses->as<float>();
    rows.rows = logits->dim(0);
    rows.vocab = logits->dim(1);
    rows.lm_weight = weights.lm;
    rows.kl_weight = weights.kl;
    rows.scale = scale;
    QM_CUDA_RETURN(cuda::LaunchTokenLosses(rows, stream()));
    return absl::OkStatus();
  }

  absl::Status DoEmbed(const Tensor& ids, const Tensor& d_rows, Tensor* d_table) override {
    QM_RETURN_IF_ERROR(Enter());
    QM_CUDA_RETURN(cuda::LaunchEmbedBackward(ids.as<int32_t>(), d_rows.as<float>(), d_rows.dim(0),
                                             d_table->dim(0), d_rows.dim(1), d_table->as<float>(),
                                             stream()));
    return absl::OkStatus();
  }

  absl::StatusOr<double> DoSumOfSquares(absl::Span<const Tensor> tensors) override {
    QM_RETURN_IF_ERROR(Enter());
    std::vector<cuda::SquaresItem> items;
    for (const Tensor& x : tensors) items.push_back({x.as<float>(), x.elements()});
    const int64_t partials = cuda::SquarePartials(items);
    QM_ASSIGN_OR_RETURN(const Tensor sums, backend().Allocate(DType::kF64, {partials + 1}));
    double* total = sums.as<double>() + partials;
    QM_CUDA_RETURN(cuda::LaunchSumOfSquares(items, sums.as<double>(), total, stream()));
    double result = 0;
    QM_CUDA_RETURN(
        cudaMemcpyAsync(&result, total, sizeof(result), cudaMemcpyDeviceToHost, stream()));
    QM_CUDA_RETURN(cudaStreamSynchronize(stream()));
    return result;
  }

  absl::Status DoAdamW(absl::Span<const AdamWUpdate> updates) override {
    QM_RETURN_IF_ERROR(Enter());
    std::vector<cuda::AdamWItem> items;
    for (const AdamWUpdate& u : updates) {
      items.push_back({u.gradient.as<float>(), u.master.as<float>(), u.first_moment.as<float>(),
                       u.second_moment.as<float>(), u.stored.data(), u.stored.dtype(),
                       u.average.empty() ? nullptr : u.average.as<float>(), u.gradient.elements(),
                       FactorsOf(u.step)});
    }
    QM_CUDA_RETURN(cuda::LaunchAdamW(items, stream()));
    return absl::OkStatus();
  }
};

}  // namespace

std::unique_ptr<TrainingOps> MakeCudaTrainingOps(Backend& backend) {
  if (!backend.device().is_cuda()) return nullptr;
  return std::make_unique<CudaTrainingOps>(backend);
}

}  // namespace quantmill
