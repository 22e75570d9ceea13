#include "core/cpu/attention.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/cpu/attention.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Must come after foreach_target.h.
#include "core/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quantmill::cpu {
namespace HWY_NAMESPACE {

// In place: row[i] = e^(row[i] - maximum) for n scores, n a multiple of 16. *maximum is the largest
// score so far and is raised to that of this row. Returns the sum of the new values.
float ExpRow(float* row, int64_t n, float* maximum) {
  const F32 d;
  const int64_t lanes = F32Lanes();
  VecF32 largest = hn::Set(d, *maximum);
  for (int64_t i = 0; i < n; i += lanes) largest = hn::Max(largest, hn::LoadU(d, row + i));
  *maximum = Maximum(d, largest);
  const VecF32 shift = hn::Set(d, *maximum);
  VecF32 sum = hn::Zero(d);
  for (int64_t i = 0; i < n; i += lanes) {
    const VecF32 value = ExpKeepNaN(d, hn::Sub(hn::LoadU(d, row + i), shift));
    sum = hn::Add(sum, value);
    hn::StoreU(value, d, row + i);
  }
  return Sum(d, sum);
}

// to = from * factor.
void Scale(const float* from, int64_t n, float factor, float* to) {
  const F32 d;
  const VecF32 factors = hn::Set(d, factor);
  int64_t i = 0;
  for (; i + F32Lanes() <= n; i += F32Lanes()) {
    hn::StoreU(hn::Mul(hn::LoadU(d, from + i), factors), d, to + i);
  }
  for (; i < n; ++i) to[i] = from[i] * factor;
}

// scores[t] = scale * q . keys[t * stride ...] for `count` keys.
void ScoreKeys(const float* q, const float* keys, int64_t stride, int64_t count, int64_t dim,
               float scale, float* scores) {
  const F32 d;
  for (int64_t t = 0; t < count; ++t) {
    const float* key = keys + t * stride;
    VecF32 sum = hn::Zero(d);
    int64_t i = 0;
    for (; i + F32Lanes() <= dim; i += F32Lanes()) {
      sum = hn::MulAdd(hn::LoadU(d, q + i), hn::LoadU(d, key + i), sum);
    }
    float value = Sum(d, sum);
    for (; i < dim; ++i) value += q[i] * key[i];
    scores[t] = value * scale;
  }
}

// out[i .. i + kVectors * lanes) = sum over t of weights[t] * values[t * stride + i ...].
template <int kVectors>
HWY_INLINE void MixColumns(const float* weights, const float* values, int64_t stride, int64_t count,
                           float* out) {
  const F32 d;
  const int64_t lanes = F32Lanes();
  VecF32 sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = hn::Zero(d);
  for (int64_t t = 0; t < count; ++t) {
    const VecF32 weight = hn::Set(d, weights[t]);
    for (int v = 0; v < kVectors; ++v) {
      sum[v] = hn::MulAdd(weight, hn::LoadU(d, values + t * stride + v * lanes), sum[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[v], d, out + v * lanes);
}

void MixValues(const float* weights, const float* values, int64_t stride, int64_t count,
               int64_t dim, float* out) {
  const int64_t lanes = F32Lanes();
  int64_t i = 0;
  for (; i + 4 * lanes <= dim; i += 4 * lanes) {
    MixColumns<4>(weights, values + i, stride, count, out + i);
  }
  for (; i + lanes <= dim; i += lanes) {
    MixColumns<1>(weights, values + i, stride, count, out + i);
  }
  for (; i < dim; ++i) {
    float sum = 0;
    for (int64_t t = 0; t < count; ++t) sum += weights[t] * values[t * stride + i];
    out[i] = sum;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace quantmill::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantmill::cpu {
namespace {

HWY_EXPORT(ExpRow);
HWY_EXPORT(Scale);
HWY_EXPORT(ScoreKeys);
HWY_EXPORT(MixValues);

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int64_t kVectorMultiple = 16;  // elements of the longest vector; see ExpRow

// Queries and keys per tile: a tile of scores is 128 KiB, which stays in the L2 cache. Few queries
// skip more of the masked triangle, many keys need fewer rescalings of the running sums.
constexpr int64_t kQueryTile = 128;
constexpr int64_t kKeyTile = 256;

// Buffers of one thread.
struct Scratch {
  std::vector<float> scores;   // [kQueryTile, kKeyTile]
  std::vector<float> sum;      // [head_dim] per query: running sum of p v
  std::vector<float> maximum;  // per query
  std::vector<float> total;    // per query: running sum of p
};

// One head of one sequence, queries [first, first + count).
struct Tile {
  const float* q;
  const float* keys;
  const float* values;
  float* out;
  int64_t q_stride, kv_stride;
  int64_t first_position;  // of the first query
  int64_t count;
};

// Keys the query at `position` sees: [FirstKey, position].
int64_t FirstKey(const AttentionShape& shape, int64_t position) {
  return shape.sliding_window > 0 ? std::max<int64_t>(0, position - shape.sliding_window + 1) : 0;
}

// Turns scores of keys [key, key + keys) into weights relative to the running maximum.
void SoftmaxStep(const AttentionShape& shape, const Tile& tile, int64_t key, int64_t keys,
                 Scratch& s) {
  const auto exp_row = HWY_DYNAMIC_DISPATCH(ExpRow);
  const auto scale = HWY_DYNAMIC_DISPATCH(Scale);
  const int64_t padded = (keys + kVectorMultiple - 1) / kVectorMultiple * kVectorMultiple;
  for (int64_t i = 0; i < tile.count; ++i) {
    float* row = s.scores.data() + i * kKeyTile;
    const int64_t position = tile.first_position + i;
    const int64_t begin = std::clamp<int64_t>(FirstKey(shape, position) - key, 0, keys);
    const int64_t end = std::clamp<int64_t>(position + 1 - key, begin, keys);
    if (begin == end) {
      std::fill(row, row + keys, 0.0f);
      continue;
    }
    std::fill(row, row + begin, kMinusInfinity);
    std::fill(row + end, row + padded, kMinusInfinity);
    const float before = s.maximum[i];
    const float total = exp_row(row, padded, &s.maximum[i]);
    const float keep = std::exp(before - s.maximum[i]);
    s.total[i] = s.total[i] * keep + total;
    float* sum = s.sum.data() + i * shape.head_dim;
    if (keep != 1.0f) scale(sum, shape.head_dim, keep, sum);
  }
}

void RunTile(const AttentionShape& shape, const Tile& tile) {
  thread_local Scratch s;
  const int64_t dim = shape.head_dim;
  s.scores.resize(static_cast<size_t>(kQueryTile * kKeyTile));
  s.sum.assign(static_cast<size_t>(tile.count * dim), 0.0f);
  s.maximum.assign(static_cast<size_t>(tile.count), kMinusInfinity);
  s.total.assign(static_cast<size_t>(tile.count), 0.0f);
  const int64_t end_key = tile.first_position + tile.count;
  const int64_t first_key = FirstKey(shape, tile.first_position) / kKeyTile * kKeyTile;
  for (int64_t key = first_key; key < end_key; key += kKeyTile) {
    const int64_t keys = std::min(kKeyTile, end_key - key);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<blasint>(tile.count),
                static_cast<blasint>(keys), static_cast<blasint>(dim), shape.scale, tile.q,
                static_cast<blasint>(tile.q_stride), tile.keys + key * tile.kv_stride,
                static_cast<blasint>(tile.kv_stride), 0.0f, s.scores.data(), kKeyTile);
    SoftmaxStep(shape, tile, key, keys, s);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, static_cast<blasint>(tile.count),
                static_cast<blasint>(dim), static_cast<blasint>(keys), 1.0f, s.scores.data(),
                kKeyTile, tile.values + key * tile.kv_stride, static_cast<blasint>(tile.kv_stride),
                1.0f, s.sum.data(), static_cast<blasint>(dim));
  }
  const auto scale = HWY_DYNAMIC_DISPATCH(Scale);
  for (int64_t i = 0; i < tile.count; ++i) {
    scale(s.sum.data() + i * dim, dim, 1.0f / s.total[i], tile.out + i * tile.q_stride);
  }
}

// A single query: reading keys and values is the work, so they are read once and in order.
void RunQuery(const AttentionShape& shape, const Tile& tile) {
  thread_local std::vector<float> weights;
  const int64_t first = FirstKey(shape, tile.first_position);
  const int64_t count = tile.first_position + 1 - first;
  const int64_t padded = (count + kVectorMultiple - 1) / kVectorMultiple * kVectorMultiple;
  weights.resize(static_cast<size_t>(padded));
  HWY_DYNAMIC_DISPATCH(ScoreKeys)
  (tile.q, tile.keys + first * tile.kv_stride, tile.kv_stride, count, shape.head_dim, shape.scale,
   weights.data());
  std::fill(weights.begin() + count, weights.end(), kMinusInfinity);
  float maximum = kMinusInfinity;
  const float total = HWY_DYNAMIC_DISPATCH(ExpRow)(weights.data(), padded, &maximum);
  HWY_DYNAMIC_DISPATCH(MixValues)
  (weights.data(), tile.values + first * tile.kv_stride, tile.kv_stride, count, shape.head_dim,
   tile.out);
  HWY_DYNAMIC_DISPATCH(Scale)(tile.out, shape.head_dim, 1.0f / total, tile.out);
}

}  // namespace

void Attention(ThreadPool& threads, const AttentionShape& shape, int64_t capacity, const float* q,
               const float* keys, const float* values, float* out) {
  const int64_t q_stride = shape.heads * shape.head_dim;
  const int64_t kv_stride = shape.kv_heads * shape.head_dim;
  const int64_t group = shape.heads / shape.kv_heads;
  const int64_t tiles = (shape.query_length + kQueryTile - 1) / kQueryTile;
  threads.ParallelFor(shape.batch * shape.heads * tiles, 1, [&](int64_t task, int64_t, int) {
    // The last queries have the most keys: they go first, so that threads end together.
    const int64_t first = (tiles - 1 - task / (shape.batch * shape.heads)) * kQueryTile;
    const int64_t sequence = task / shape.heads % shape.batch;
    const int64_t head = task % shape.heads;
    const int64_t q_offset =
        (sequence * shape.query_length + first) * q_stride + head * shape.head_dim;
    const int64_t kv_offset = sequence * capacity * kv_stride + head / group * shape.head_dim;
    const Tile tile = {q + q_offset,
                       keys + kv_offset,
                       values + kv_offset,
                       out + q_offset,
                       q_stride,
                       kv_stride,
                       shape.past_length + first,
                       std::min(kQueryTile, shape.query_length - first)};
    shape.query_length == 1 ? RunQuery(shape, tile) : RunTile(shape, tile);
  });
}

}  // namespace quantmill::cpu
#endif  // HWY_ONCE
