#include "core/cpu/moe.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace quantmill::cpu {
namespace {

constexpr int64_t kRows = 64;  // per range

// NaN sorts last, so that the order stays total on broken input.
float SortKey(float logit) {
  return std::isnan(logit) ? -std::numeric_limits<float>::infinity() : logit;
}

void RouteRow(const float* logits, int64_t experts, int64_t top_k, bool normalize, int32_t* indices,
              float* weights) {
  std::vector<int32_t> order(static_cast<size_t>(experts));
  std::iota(order.begin(), order.end(), 0);
  // A larger logit is a larger probability; comparing logits avoids ties made by rounding. The
  // index decides between equal ones, which makes the order total.
  std::partial_sort(order.begin(), order.begin() + top_k, order.end(), [&](int32_t a, int32_t b) {
    const float x = SortKey(logits[a]), y = SortKey(logits[b]);
    return x != y ? x > y : a < b;
  });
  const float maximum = logits[order[0]];
  float sum = 0;
  for (int64_t e = 0; e < experts; ++e) sum += std::exp(logits[e] - maximum);
  float chosen = 0;
  for (int64_t i = 0; i < top_k; ++i) {
    indices[i] = order[static_cast<size_t>(i)];
    weights[i] = std::exp(logits[indices[i]] - maximum) / sum;
    chosen += weights[i];
  }
  if (!normalize) return;
  for (int64_t i = 0; i < top_k; ++i) weights[i] /= chosen;
}

}  // namespace

void RouteTopK(ThreadPool& threads, const float* logits, int64_t rows, int64_t experts,
               int64_t top_k, bool normalize, int32_t* indices, float* weights) {
  threads.ParallelFor(rows, kRows, [=](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      RouteRow(logits + row * experts, experts, top_k, normalize, indices + row * top_k,
               weights + row * top_k);
    }
  });
}

void GatherRows(ThreadPool& threads, const float* x, const int32_t* rows, int64_t n, int64_t width,
                float* out) {
  threads.ParallelFor(n, kRows, [=](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(out + i * width, x + rows[i] * width, static_cast<size_t>(width) * sizeof(float));
    }
  });
}

void ScatterAddRows(ThreadPool& threads, const float* x, const int32_t* rows, const float* weights,
                    int64_t n, int64_t width, float* target) {
  threads.ParallelFor(n, kRows, [=](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      float* to = target + rows[i] * width;
      const float* from = x + i * width;
      for (int64_t j = 0; j < width; ++j) to[j] += weights[i] * from[j];
    }
  });
}

}  // namespace quantmill::cpu
