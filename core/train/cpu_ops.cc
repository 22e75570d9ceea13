#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "absl/types/span.h"
#include "core/base/status.h"
#include "core/cpu/convert.h"
#include "core/threads/thread_pool.h"
#include "core/train/device_ops.h"

namespace quantmill {
namespace {

constexpr int64_t kElementGrain = 16384;  // elements per range: pays for handing it to a thread
constexpr int64_t kRunTile = 64;          // runs whose share of a norm's gradient is one sum
constexpr int64_t kColumnTile = 256;      // columns of a bias per range
constexpr int64_t kQueryRows = 128;       // queries of one tile of attention

blasint Blas(int64_t value) { return static_cast<blasint>(value); }

int64_t RunGrain(int64_t width) { return std::max<int64_t>(1, kElementGrain / width); }

// One run of a norm: with g = d_y weight and r = (mean(x^2) + eps)^-1/2,
//   d_x_i = r g_i - r^3 / width x_i sum_j g_j x_j,   d_weight_i += d_y_i x_i r.
struct NormRun {
  const float* x;
  const float* d_y;
  float* d_x;
  float* d_weight;  // null: not wanted
};

void NormRunBackward(const NormRun& run, const std::vector<float>& weight, float eps, bool add) {
  const int64_t width = static_cast<int64_t>(weight.size());
  double squares = 0, dot = 0;
  for (int64_t i = 0; i < width; ++i) {
    squares += double{run.x[i]} * run.x[i];
    dot += double{run.d_y[i]} * weight[i] * run.x[i];
  }
  const double scale = 1.0 / std::sqrt(squares / static_cast<double>(width) + eps);
  const float r = static_cast<float>(scale);
  const float slope = static_cast<float>(scale * scale * scale * dot / static_cast<double>(width));
  if (run.d_weight != nullptr) {
    for (int64_t i = 0; i < width; ++i) run.d_weight[i] += run.d_y[i] * run.x[i] * r;
  }
  for (int64_t i = 0; i < width; ++i) {
    const float gradient = r * run.d_y[i] * weight[i] - slope * run.x[i];
    run.d_x[i] = add ? run.d_x[i] + gradient : gradient;
  }
}

// One head of one sequence.
struct HeadTask {
  const float* q;
  const float* keys;
  const float* values;
  const float* d_out;
  float* d_q;
  float* d_keys;  // [length, head_dim] of this head alone, zero at first
  float* d_values;
  int64_t q_stride, kv_stride;
};

// Scores of one row, masked to [begin, end), become probabilities.
void SoftmaxRow(float* row, int64_t begin, int64_t end, int64_t width) {
  const float maximum = *std::max_element(row + begin, row + end);
  float total = 0;
  for (int64_t j = begin; j < end; ++j) total += row[j] = std::exp(row[j] - maximum);
  std::fill(row, row + begin, 0.0f);
  std::fill(row + end, row + width, 0.0f);
  for (int64_t j = begin; j < end; ++j) row[j] /= total;
}

// With P = softmax(S), S = scale q k^T + mask, out = P v:
//   d_v = P^T d_out,  d_P = d_out v^T,  d_S = P (d_P - rowsum(P d_P)),
//   d_q = scale d_S k,  d_k = scale d_S^T q.
void HeadBackward(const AttentionShape& shape, const HeadTask& head) {
  const int64_t dim = shape.head_dim, length = shape.query_length, window = shape.sliding_window;
  std::vector<float> p(static_cast<size_t>(kQueryRows * length));
  std::vector<float> d_p(p.size());
  for (int64_t first = 0; first < length; first += kQueryRows) {
    const int64_t rows = std::min(kQueryRows, length - first);
    const int64_t key = window > 0 ? std::max<int64_t>(0, first - window + 1) : 0;
    const int64_t keys = first + rows - key;
    const float* q = head.q + first * head.q_stride;
    const float* d_out = head.d_out + first * head.q_stride;
    const float* k = head.keys + key * head.kv_stride;
    const float* v = head.values + key * head.kv_stride;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, Blas(rows), Blas(keys), Blas(dim),
                shape.scale, q, Blas(head.q_stride), k, Blas(head.kv_stride), 0.0f, p.data(),
                Blas(keys));
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, Blas(rows), Blas(keys), Blas(dim), 1.0f,
                d_out, Blas(head.q_stride), v, Blas(head.kv_stride), 0.0f, d_p.data(), Blas(keys));
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t position = first + i;
      const int64_t begin = window > 0 ? std::max<int64_t>(0, position - window + 1) - key : 0;
      SoftmaxRow(p.data() + i * keys, begin, position + 1 - key, keys);
    }
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, Blas(keys), Blas(dim), Blas(rows), 1.0f,
                p.data(), Blas(keys), d_out, Blas(head.q_stride), 1.0f, head.d_values + key * dim,
                Blas(dim));
    for (int64_t i = 0; i < rows; ++i) {
      const float* p_row = p.data() + i * keys;
      float* d_row = d_p.data() + i * keys;
      double sum = 0;
      for (int64_t j = 0; j < keys; ++j) sum += double{p_row[j]} * d_row[j];
      const float mean = static_cast<float>(sum);
      for (int64_t j = 0; j < keys; ++j) d_row[j] = p_row[j] * (d_row[j] - mean);
    }
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, Blas(rows), Blas(dim), Blas(keys),
                shape.scale, d_p.data(), Blas(keys), k, Blas(head.kv_stride), 0.0f,
                head.d_q + first * head.q_stride, Blas(head.q_stride));
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, Blas(keys), Blas(dim), Blas(rows),
                shape.scale, d_p.data(), Blas(keys), q, Blas(head.q_stride), 1.0f,
                head.d_keys + key * dim, Blas(dim));
  }
}

// Largest value and sum of exp(value - largest).
struct LogSum {
  float largest;
  double sum;
  double log() const { return double{largest} + std::log(sum); }
};
LogSum LogSumExp(absl::Span<const float> values) {
  LogSum result = {*std::max_element(values.begin(), values.end()), 0};
  for (float value : values) result.sum += std::exp(value - result.largest);
  return result;
}

// d -log q[t] / d s = q - onehot(t);  d KL(p || q) / d s = q - p.
void TokenLossRow(int32_t target, absl::Span<const float> teacher, const TokenLoss& weights,
                  float scale, absl::Span<float> logits, float* losses) {
  losses[0] = losses[1] = 0;
  if (target < 0) {
    std::fill(logits.begin(), logits.end(), 0.0f);
    return;
  }
  const LogSum q = LogSumExp(logits);
  losses[0] = static_cast<float>(q.log() - logits[static_cast<size_t>(target)]);
  const float total = (weights.lm + weights.kl) * scale;
  const bool distills = !teacher.empty();
  const LogSum p = distills ? LogSumExp(teacher) : LogSum{0, 1};
  double kl = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double share = std::exp(logits[i] - q.largest) / q.sum;
    double gradient = total * share;
    if (distills) {
      const double wanted = std::exp(teacher[i] - p.largest) / p.sum;
      kl += wanted * ((teacher[i] - p.log()) - (logits[i] - q.log()));
      gradient -= double{weights.kl} * scale * wanted;
    }
    logits[i] = static_cast<float>(gradient);
  }
  logits[static_cast<size_t>(target)] -= weights.lm * scale;
  losses[1] = static_cast<float>(kl);
}

class CpuTrainingOps final : public TrainingOps {
 public:
  using TrainingOps::TrainingOps;

 private:
  ThreadPool& threads() { return backend().threads(); }

  absl::Status DoBiasGradient(const Tensor& d_y, Tensor* d_bias) override {
    const int64_t rows = d_y.dim(0), columns = d_y.dim(1);
    const float* from = d_y.as<const float>();
    float* to = d_bias->as<float>();
    threads().ParallelFor(columns, kColumnTile, [&](int64_t begin, int64_t end, int) {
      double sums[kColumnTile] = {};
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t j = begin; j < end; ++j) sums[j - begin] += from[row * columns + j];
      }
      for (int64_t j = begin; j < end; ++j) to[j] += static_cast<float>(sums[j - begin]);
    });
    return absl::OkStatus();
  }

  absl::Status DoRmsNorm(const Tensor& x, const Tensor& weight, float eps, const Tensor& d_y,
                         bool add, Tensor* d_x, Tensor* d_weight) override {
    const std::vector<float> values = cpu::F32Values(weight);
    const int64_t width = weight.dim(0), runs = x.elements() / width;
    const int64_t tiles = (runs + kRunTile - 1) / kRunTile;
    std::vector<float> partial;
    if (d_weight != nullptr) partial.assign(static_cast<size_t>(tiles * width), 0.0f);
    threads().ParallelFor(tiles, 1, [&](int64_t tile, int64_t, int) {
      const int64_t end = std::min(runs, (tile + 1) * kRunTile);
      for (int64_t run = tile * kRunTile; run < end; ++run) {
        const int64_t at = run * width;
        NormRunBackward(
            {x.as<const float>() + at, d_y.as<const float>() + at, d_x->as<float>() + at,
             d_weight == nullptr ? nullptr : partial.data() + tile * width},
            values, eps, add);
      }
    });
    if (d_weight == nullptr) return absl::OkStatus();
    for (int64_t i = 0; i < width; ++i) {
      double sum = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        sum += partial[static_cast<size_t>(tile * width + i)];
      }
      d_weight->as<float>()[i] += static_cast<float>(sum);
    }
    return absl::OkStatus();
  }

  absl::Status DoRope(const RopeRows& shape, Tensor* d_x) override {
    const int64_t half = shape.head_dim / 2, heads = d_x->dim(1) / shape.head_dim;
    threads().ParallelFor(d_x->dim(0), RunGrain(d_x->dim(1)), [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t position = shape.first_position + row % shape.length;
        const float* c = shape.cosine.as<const float>() + position * half;
        const float* s = shape.sine.as<const float>() + position * half;
        for (int64_t head = 0; head < heads; ++head) {
          float* low = d_x->as<float>() + row * d_x->dim(1) + head * shape.head_dim;
          float* high = low + half;
          for (int64_t i = 0; i < half; ++i) {
            const float a = low[i], b = high[i];
            low[i] = a * c[i] + b * s[i];
            high[i] = b * c[i] - a * s[i];
          }
        }
      }
    });
    return absl::OkStatus();
  }

  absl::Status DoAttention(const AttentionShape& shape, const Tensor& q, const Tensor& keys,
                           const Tensor& values, const Tensor& d_out, Tensor* d_q, Tensor* d_keys,
                           Tensor* d_values) override {
    const int64_t dim = shape.head_dim, length = shape.query_length;
    const int64_t heads = shape.batch * shape.heads, group = shape.heads / shape.kv_heads;
    const int64_t q_stride = shape.heads * dim, kv_stride = shape.kv_heads * dim;
    // Every head has sums of its own, so that all of them run at once.
    QM_ASSIGN_OR_RETURN(Tensor key_sums, Tensor::HostZeros(DType::kF32, {heads, length * dim}));
    QM_ASSIGN_OR_RETURN(Tensor value_sums, Tensor::HostZeros(DType::kF32, {heads, length * dim}));
    threads().ParallelFor(heads, 1, [&](int64_t task, int64_t, int) {
      const int64_t row = task / shape.heads * length, head = task % shape.heads;
      const int64_t at = row * q_stride + head * dim;
      const int64_t pair = row * kv_stride + head / group * dim;
      HeadBackward(shape, {q.as<const float>() + at, keys.as<const float>() + pair,
                           values.as<const float>() + pair, d_out.as<const float>() + at,
                           d_q->as<float>() + at, key_sums.as<float>() + task * length * dim,
                           value_sums.as<float>() + task * length * dim, q_stride, kv_stride});
    });
    threads().ParallelFor(shape.batch * length, RunGrain(kv_stride),
                          [&](int64_t begin, int64_t end, int) {
                            for (int64_t row = begin; row < end; ++row) {
                              AddHeads(shape, key_sums, row, d_keys);
                              AddHeads(shape, value_sums, row, d_values);
                            }
                          });
    return absl::OkStatus();
  }

  // One row of d_keys or d_values: the sum over the heads that share them.
  static void AddHeads(const AttentionShape& shape, const Tensor& sums, int64_t row, Tensor* out) {
    const int64_t dim = shape.head_dim, length = shape.query_length;
    const int64_t group = shape.heads / shape.kv_heads;
    float* to = out->as<float>() + row * shape.kv_heads * dim;
    std::fill(to, to + shape.kv_heads * dim, 0.0f);
    for (int64_t head = 0; head < shape.heads; ++head) {
      const float* from = sums.as<const float>() +
                          ((row / length * shape.heads + head) * length + row % length) * dim;
      for (int64_t i = 0; i < dim; ++i) to[head / group * dim + i] += from[i];
    }
  }

  absl::Status DoSiluMultiply(const Tensor& gate, const Tensor& up, const Tensor& d_y,
                              Tensor* d_gate, Tensor* d_up) override {
    threads().ParallelFor(gate.elements(), kElementGrain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const float g = gate.as<const float>()[i], d = d_y.as<const float>()[i];
        const float sigmoid = 1.0f / (1.0f + std::exp(-g));
        d_gate->as<float>()[i] =
            d * up.as<const float>()[i] * sigmoid * (1.0f + g * (1.0f - sigmoid));
        d_up->as<float>()[i] = d * g * sigmoid;
      }
    });
    return absl::OkStatus();
  }

  absl::Status DoAdd(const Tensor& x, Tensor* target) override {
    const float* from = x.as<const float>();
    float* to = target->as<float>();
    threads().ParallelFor(x.elements(), kElementGrain, [=](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) to[i] += from[i];
    });
    return absl::OkStatus();
  }

  absl::Status DoTokenLosses(const Tensor& targets, const Tensor& teacher, const TokenLoss& weights,
                             float scale, Tensor* logits, Tensor* losses) override {
    const int64_t vocab = logits->dim(1);
    threads().ParallelFor(logits->dim(0), 1, [&](int64_t row, int64_t, int) {
      std::vector<float> p;
      if (!teacher.empty()) {
        p.resize(static_cast<size_t>(vocab));
        cpu::ToF32(cpu::ElementAddress(teacher.data(), teacher.dtype(), row * vocab),
                   teacher.dtype(), vocab, p.data());
      }
      TokenLossRow(targets.as<const int32_t>()[row], p, weights, scale,
                   {logits->as<float>() + row * vocab, static_cast<size_t>(vocab)},
                   losses->as<float>() + row * 2);
    });
    return absl::OkStatus();
  }

  absl::Status DoEmbed(const Tensor& ids, const Tensor& d_rows, Tensor* d_table) override {
    const int64_t width = d_rows.dim(1);
    threads().ParallelFor(width, kColumnTile, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = 0; row < d_rows.dim(0); ++row) {
        const float* from = d_rows.as<const float>() + row * width;
        float* to = d_table->as<float>() + int64_t{ids.as<const int32_t>()[row]} * width;
        for (int64_t i = begin; i < end; ++i) to[i] += from[i];
      }
    });
    return absl::OkStatus();
  }

  absl::Status DoDifference(const Tensor& y, const Tensor& target, Tensor* d_y) override {
    threads().ParallelFor(y.elements(), kElementGrain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        d_y->as<float>()[i] = y.as<const float>()[i] - target.as<const float>()[i];
      }
    });
    return absl::OkStatus();
  }

  absl::Status DoScale(float scale, Tensor* x) override {
    threads().ParallelFor(x->elements(), kElementGrain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) x->as<float>()[i] *= scale;
    });
    return absl::OkStatus();
  }

  absl::StatusOr<double> DoSumOfSquares(absl::Span<const Tensor> tensors) override {
    double total = 0;
    for (const Tensor& x : tensors) total += SquaresOf(x);
    return total;
  }

  double SquaresOf(const Tensor& x) {
    const int64_t count = x.elements();
    std::vector<double> sums(static_cast<size_t>((count + kElementGrain - 1) / kElementGrain));
    threads().ParallelFor(count, kElementGrain, [&](int64_t begin, int64_t end, int) {
      double sum = 0;
      for (int64_t i = begin; i < end; ++i) {
        sum += double{x.as<const float>()[i]} * x.as<const float>()[i];
      }
      sums[static_cast<size_t>(begin / kElementGrain)] = sum;
    });
    double total = 0;
    for (double sum : sums) total += sum;
    return total;
  }

  absl::Status DoAdamW(absl::Span<const AdamWUpdate> updates) override {
    for (const AdamWUpdate& u : updates) {
      const AdamWFactors f = FactorsOf(u.step);
      threads().ParallelFor(u.gradient.elements(), kElementGrain,
                            [&](int64_t begin, int64_t end, int) { Update(u, f, begin, end); });
    }
    return absl::OkStatus();
  }

  static void Update(const AdamWUpdate& u, const AdamWFactors& f, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float& gradient = u.gradient.as<float>()[i];
      float& m = u.first_moment.as<float>()[i];
      float& v = u.second_moment.as<float>()[i];
      float& p = u.master.as<float>()[i];
      const float g = gradient * f.gradient_scale;
      m = f.beta1 * m + f.rest1 * g;
      v = f.beta2 * v + f.rest2 * g * g;
      p = p * f.keep - f.rate * m / (std::sqrt(v) * f.root + f.epsilon);
      if (!u.average.empty()) {
        float& average = u.average.as<float>()[i];
        average = f.average_keep * average + f.average_rest * p;
      }
      StoreFloat(u.stored, i, p);
      gradient = 0;
    }
  }
};

}  // namespace

std::unique_ptr<TrainingOps> MakeCpuTrainingOps(Backend& backend) {
  return std::make_unique<CpuTrainingOps>(backend);
}

}  // namespace quantmill
