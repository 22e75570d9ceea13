#include "core/cpu/attention.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace quantmill::cpu {
namespace {

// Queries and keys per tile: a tile of scores is 64 KiB.
constexpr int64_t kQueryTile = 128;
constexpr int64_t kKeyTile = 128;

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
  for (int64_t i = 0; i < tile.count; ++i) {
    float* row = s.scores.data() + i * kKeyTile;
    const int64_t position = tile.first_position + i;
    const int64_t begin = std::clamp<int64_t>(FirstKey(shape, position) - key, 0, keys);
    const int64_t end = std::clamp<int64_t>(position + 1 - key, begin, keys);
    float maximum = s.maximum[i];
    for (int64_t j = begin; j < end; ++j) maximum = std::max(maximum, row[j]);
    float total = 0;
    for (int64_t j = 0; j < begin; ++j) row[j] = 0;
    for (int64_t j = begin; j < end; ++j) total += row[j] = std::exp(row[j] - maximum);
    for (int64_t j = end; j < keys; ++j) row[j] = 0;
    if (begin == end) continue;
    const float keep = std::exp(s.maximum[i] - maximum);
    s.maximum[i] = maximum;
    s.total[i] = s.total[i] * keep + total;
    float* sum = s.sum.data() + i * shape.head_dim;
    for (int64_t j = 0; j < shape.head_dim; ++j) sum[j] *= keep;
  }
}

void RunTile(const AttentionShape& shape, const Tile& tile) {
  thread_local Scratch s;
  const int64_t dim = shape.head_dim;
  s.scores.resize(static_cast<size_t>(kQueryTile * kKeyTile));
  s.sum.assign(static_cast<size_t>(tile.count * dim), 0.0f);
  s.maximum.assign(static_cast<size_t>(tile.count), -std::numeric_limits<float>::infinity());
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
  for (int64_t i = 0; i < tile.count; ++i) {
    const float scale = 1.0f / s.total[i];
    for (int64_t j = 0; j < dim; ++j) tile.out[i * tile.q_stride + j] = s.sum[i * dim + j] * scale;
  }
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
    RunTile(shape, Tile{q + q_offset, keys + kv_offset, values + kv_offset, out + q_offset,
                        q_stride, kv_stride, shape.past_length + first,
                        std::min(kQueryTile, shape.query_length - first)});
  });
}

}  // namespace quantmill::cpu
