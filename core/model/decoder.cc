#include "core/model/decoder.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/model/block_parts.h"

namespace quantmill {
namespace {

constexpr int kGroupQkv = 0;
constexpr int kGroupO = 1;
constexpr int kGroupGateUp = 2;

int64_t SlidingWindow(const ModelConfig& config, int64_t block) {
  const size_t index = static_cast<size_t>(block);
  return index < config.sliding_window.size() ? config.sliding_window[index] : 0;
}

// The keys and values of all positions, and where the new ones are to be written.
struct KeyValues {
  Tensor keys, values;          // what attention reads
  Tensor new_keys, new_values;  // [batch * length, kv_features]
  int64_t past = 0;
  bool in_place = true;  // the new ones are part of keys and values
};

absl::Status CheckCache(const KvCache& cache, const BlockRun& run, int64_t length) {
  if (run.first_position != cache.length || cache.keys.dim(0) % run.batch != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("a key/value cache of ", cache.length, " positions cannot take ", run.batch,
                     " sequences from position ", run.first_position,
                     "; continue as many sequences as it was made for, from where it ends"));
  }
  const int64_t capacity = cache.keys.dim(0) / run.batch;
  if (cache.length + length > capacity) {
    return absl::OutOfRangeError(absl::StrCat("the key/value cache is full; it holds ", capacity,
                                              " positions and needs ", cache.length + length,
                                              "; ask for fewer tokens"));
  }
  return absl::OkStatus();
}

absl::StatusOr<KeyValues> KeyValueRows(Backend& backend, const ModelConfig& config,
                                       const BlockRun& run, DType dtype, int64_t rows) {
  KeyValues kv;
  if (run.cache != nullptr) {
    const KvCache& cache = *run.cache;
    QM_RETURN_IF_ERROR(CheckCache(cache, run, rows / run.batch));
    kv.keys = cache.keys;
    kv.values = cache.values;
    kv.past = cache.length;
    if (run.batch == 1) {
      kv.new_keys = cache.keys.Rows(cache.length, cache.length + rows);
      kv.new_values = cache.values.Rows(cache.length, cache.length + rows);
      return kv;
    }
  }
  QM_ASSIGN_OR_RETURN(kv.new_keys, backend.Allocate(dtype, {rows, config.kv_features()}));
  QM_ASSIGN_OR_RETURN(kv.new_values, backend.Allocate(dtype, {rows, config.kv_features()}));
  kv.in_place = run.cache == nullptr;
  if (kv.in_place) {
    kv.keys = kv.new_keys;
    kv.values = kv.new_values;
  }
  return kv;
}

// Copies every sequence's new rows behind its old ones in the cache.
absl::Status AppendToCache(Backend& backend, const KeyValues& kv, int64_t batch) {
  Tensor keys = kv.keys, values = kv.values;
  QM_RETURN_IF_ERROR(backend.CopyPieces(kv.new_keys, batch, kv.past, &keys));
  return backend.CopyPieces(kv.new_values, batch, kv.past, &values);
}

absl::Status CheckRun(const ModelConfig& config, const RopeTables& rope, const BlockRun& run,
                      const Tensor& x) {
  if (x.rank() != 2 || x.dim(1) != config.hidden_size || run.batch < 1 ||
      x.dim(0) % run.batch != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "hidden states ", x.shape().ToString(), " do not hold ", run.batch,
        " sequences of equal length with ", config.hidden_size, " values per position"));
  }
  const int64_t positions = run.first_position + x.dim(0) / run.batch;
  if (positions > rope.cosine.dim(0)) {
    return absl::OutOfRangeError(absl::StrCat("position ", positions - 1, " is beyond the ",
                                              rope.cosine.dim(0),
                                              " positions prepared; use a shorter context"));
  }
  return absl::OkStatus();
}

// q/k norms and rotary embedding.
absl::Status PlaceQueriesAndKeys(Backend& backend, const ModelConfig& config,
                                 const BlockWeights& weights, const RopeTables& rope,
                                 const BlockRun& run, int64_t length, Tensor* q, Tensor* k) {
  if (config.qk_norm) {
    const float eps = static_cast<float>(config.rms_norm_eps);
    QM_RETURN_IF_ERROR(backend.RmsNorm(*q, weights.q_norm, eps, q));
    QM_RETURN_IF_ERROR(backend.RmsNorm(*k, weights.k_norm, eps, k));
  }
  QM_RETURN_IF_ERROR(
      backend.Rope(rope.cosine, rope.sine, run.first_position, length, config.head_dim, q));
  return backend.Rope(rope.cosine, rope.sine, run.first_position, length, config.head_dim, k);
}

}  // namespace

AttentionShape BlockAttention(const ModelConfig& config, int64_t block, int64_t batch,
                              int64_t length, int64_t past) {
  AttentionShape shape;
  shape.batch = batch;
  shape.query_length = length;
  shape.past_length = past;
  shape.heads = config.heads;
  shape.kv_heads = config.kv_heads;
  shape.head_dim = config.head_dim;
  shape.sliding_window = SlidingWindow(config, block);
  shape.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(config.head_dim)));
  return shape;
}

absl::StatusOr<Tensor> Normalized(Backend& backend, const ModelConfig& config, const Tensor& weight,
                                  const Tensor& hidden) {
  QM_ASSIGN_OR_RETURN(Tensor normed, backend.Allocate(hidden.dtype(), hidden.shape()));
  QM_RETURN_IF_ERROR(
      backend.RmsNorm(hidden, weight, static_cast<float>(config.rms_norm_eps), &normed));
  return normed;
}

absl::Status ObserveInput(const BlockRun& run, int input_group, const Tensor& x, bool* stopped) {
  if (run.observer != nullptr) QM_RETURN_IF_ERROR(run.observer->OnInput(input_group, x));
  if (input_group >= run.stop_after_group) *stopped = true;
  return absl::OkStatus();
}

absl::Status RunGatedMlp(Backend& backend, const LinearWeight& gate, const LinearWeight& up,
                         const LinearWeight& down, int64_t intermediate_size, int group,
                         const BlockRun& run, const Tensor& x, Tensor* out, bool* stopped) {
  QM_RETURN_IF_ERROR(ObserveInput(run, group, x, stopped));
  if (*stopped) return absl::OkStatus();
  const Shape inner = {x.dim(0), intermediate_size};
  QM_ASSIGN_OR_RETURN(Tensor gated, backend.Allocate(x.dtype(), inner));
  if (x.dim(0) > 0) {
    QM_ASSIGN_OR_RETURN(Tensor raised, backend.Allocate(x.dtype(), inner));
    QM_RETURN_IF_ERROR(ApplyLinear(backend, gate, x, &gated));
    QM_RETURN_IF_ERROR(ApplyLinear(backend, up, x, &raised));
    QM_RETURN_IF_ERROR(backend.SiluMultiply(gated, raised, &gated));
  }
  QM_RETURN_IF_ERROR(ObserveInput(run, group + 1, gated, stopped));
  if (*stopped || x.dim(0) == 0) return absl::OkStatus();
  return ApplyLinear(backend, down, gated, out);
}

absl::Status RunAttention(Backend& backend, const ModelConfig& config, const BlockWeights& weights,
                          int64_t block, const RopeTables& rope, const BlockRun& run,
                          const Tensor& x, Tensor* out, bool* stopped) {
  QM_RETURN_IF_ERROR(ObserveInput(run, kGroupQkv, x, stopped));
  if (*stopped) return absl::OkStatus();
  const int64_t rows = x.dim(0);
  const int64_t length = rows / run.batch;
  QM_ASSIGN_OR_RETURN(KeyValues kv, KeyValueRows(backend, config, run, x.dtype(), rows));
  QM_ASSIGN_OR_RETURN(Tensor q, backend.Allocate(x.dtype(), {rows, config.q_features()}));
  QM_RETURN_IF_ERROR(ApplyLinear(backend, weights.q, x, &q));
  QM_RETURN_IF_ERROR(ApplyLinear(backend, weights.k, x, &kv.new_keys));
  QM_RETURN_IF_ERROR(ApplyLinear(backend, weights.v, x, &kv.new_values));
  QM_RETURN_IF_ERROR(
      PlaceQueriesAndKeys(backend, config, weights, rope, run, length, &q, &kv.new_keys));
  if (!kv.in_place) QM_RETURN_IF_ERROR(AppendToCache(backend, kv, run.batch));
  const AttentionShape shape = BlockAttention(config, block, run.batch, length, kv.past);
  QM_ASSIGN_OR_RETURN(Tensor mixed, backend.Allocate(x.dtype(), {rows, config.q_features()}));
  QM_RETURN_IF_ERROR(backend.Attention(shape, q, kv.keys, kv.values, &mixed));
  if (run.cache != nullptr) run.cache->length += length;
  QM_RETURN_IF_ERROR(ObserveInput(run, kGroupO, mixed, stopped));
  if (*stopped) return absl::OkStatus();
  return ApplyLinear(backend, weights.o, mixed, out);
}

absl::Status RunMlp(Backend& backend, const ModelConfig& config, const BlockWeights& weights,
                    const BlockRun& run, const Tensor& x, Tensor* out, bool* stopped) {
  if (!weights.moe.experts.empty()) {
    return RunExperts(backend, config, weights.moe, run, x, out, stopped);
  }
  return RunGatedMlp(backend, weights.gate, weights.up, weights.down, config.intermediate_size,
                     kGroupGateUp, run, x, out, stopped);
}

absl::Status RunBlock(Backend& backend, const ModelConfig& config, const BlockWeights& weights,
                      int64_t block, const RopeTables& rope, const BlockRun& run, Tensor* hidden) {
  QM_RETURN_IF_ERROR(CheckRun(config, rope, run, *hidden));
  bool stopped = false;
  QM_ASSIGN_OR_RETURN(Tensor change, backend.Allocate(hidden->dtype(), hidden->shape()));
  {
    QM_ASSIGN_OR_RETURN(const Tensor normed,
                        Normalized(backend, config, weights.input_norm, *hidden));
    QM_RETURN_IF_ERROR(
        RunAttention(backend, config, weights, block, rope, run, normed, &change, &stopped));
  }
  if (stopped) return absl::OkStatus();
  QM_RETURN_IF_ERROR(backend.Add(change, hidden));
  QM_ASSIGN_OR_RETURN(const Tensor normed,
                      Normalized(backend, config, weights.post_attention_norm, *hidden));
  QM_RETURN_IF_ERROR(RunMlp(backend, config, weights, run, normed, &change, &stopped));
  if (stopped) return absl::OkStatus();
  return backend.Add(change, hidden);
}

absl::Status RunHead(Backend& backend, const ModelConfig& config, const Tensor& final_norm,
                     const LinearWeight& head, const Tensor& hidden, Tensor* logits) {
  QM_ASSIGN_OR_RETURN(const Tensor normed, Normalized(backend, config, final_norm, hidden));
  return ApplyLinear(backend, head, normed, logits);
}

}  // namespace quantmill
