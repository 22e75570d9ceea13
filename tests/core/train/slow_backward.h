// Backward passes of single operations in f64, straight from the definitions of the derivatives;
// no code shared with core/. Matrices are row-major.
#ifndef QUANTMILL_TESTS_CORE_TRAIN_SLOW_BACKWARD_H_
#define QUANTMILL_TESTS_CORE_TRAIN_SLOW_BACKWARD_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/tensor/backend.h"

namespace quantmill::testing {

using Doubles = std::vector<double>;

struct SlowAttention {
  Doubles d_q, d_keys, d_values;
};

// One (query, head) after the other: p_j = exp(s_j) / sum, s_j = scale q k_j;
// d_s_j = sum_i d_p_i (d p_i / d s_j) = sum_i d_p_i p_i ((i == j) - p_j).
inline SlowAttention SlowAttentionBackward(const AttentionShape& shape, const Doubles& q,
                                           const Doubles& keys, const Doubles& values,
                                           const Doubles& d_out) {
  const int64_t dim = shape.head_dim, length = shape.query_length;
  const int64_t group = shape.heads / shape.kv_heads;
  SlowAttention result = {Doubles(q.size()), Doubles(keys.size()), Doubles(keys.size())};
  for (int64_t row = 0; row < shape.batch * length; ++row) {
    const int64_t t = row % length, start = row - t;
    const int64_t first =
        shape.sliding_window > 0 ? std::max<int64_t>(0, t - shape.sliding_window + 1) : 0;
    for (int64_t head = 0; head < shape.heads; ++head) {
      const auto at = [&](int64_t i) {
        return static_cast<size_t>((row * shape.heads + head) * dim + i);
      };
      const auto pair = [&](int64_t key, int64_t i) {
        return static_cast<size_t>(((start + key) * shape.kv_heads + head / group) * dim + i);
      };
      Doubles p, d_p;
      double total = 0, largest = -1e300;
      for (int64_t key = first; key <= t; ++key) {
        double score = 0, change = 0;
        for (int64_t i = 0; i < dim; ++i) {
          score += q[at(i)] * keys[pair(key, i)];
          change += d_out[at(i)] * values[pair(key, i)];
        }
        p.push_back(shape.scale * score);
        d_p.push_back(change);
        largest = std::max(largest, p.back());
      }
      for (double& value : p) total += value = std::exp(value - largest);
      double mean = 0;
      for (size_t j = 0; j < p.size(); ++j) mean += (p[j] /= total) * d_p[j];
      for (size_t j = 0; j < p.size(); ++j) {
        const double d_s = p[j] * (d_p[j] - mean);
        for (int64_t i = 0; i < dim; ++i) {
          const size_t k = pair(first + static_cast<int64_t>(j), i);
          result.d_values[k] += p[j] * d_out[at(i)];
          result.d_q[at(i)] += shape.scale * d_s * keys[k];
          result.d_keys[k] += shape.scale * d_s * q[at(i)];
        }
      }
    }
  }
  return result;
}

struct SlowNorm {
  Doubles d_x, d_weight;
};

inline SlowNorm SlowNormBackward(const Doubles& x, const Doubles& weight, double eps,
                                 const Doubles& d_y) {
  const size_t width = weight.size();
  SlowNorm result = {Doubles(x.size()), Doubles(width)};
  for (size_t run = 0; run < x.size(); run += width) {
    double squares = 0;
    for (size_t i = 0; i < width; ++i) squares += x[run + i] * x[run + i];
    const double mean = squares / static_cast<double>(width) + eps;
    for (size_t i = 0; i < width; ++i) {
      result.d_weight[i] += d_y[run + i] * x[run + i] / std::sqrt(mean);
      // d y_i / d x_j = w_i ((i == j) mean^-1/2 - x_i x_j / width mean^-3/2)
      for (size_t j = 0; j < width; ++j) {
        const double slope = (i == j ? 1 / std::sqrt(mean) : 0.0) - x[run + i] * x[run + j] /
                                                                        static_cast<double>(width) /
                                                                        std::pow(mean, 1.5);
        result.d_x[run + j] += d_y[run + i] * weight[i] * slope;
      }
    }
  }
  return result;
}

// The largest difference over the largest expected value; infinite for a NaN.
inline double RelativeError(const Doubles& actual, const Doubles& expected) {
  double worst = 0, largest = 1e-30;
  for (double value : expected) largest = std::max(largest, std::abs(value));
  if (actual.size() != expected.size()) return HUGE_VAL;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double error = std::abs(actual[i] - expected[i]) / largest;
    if (!(error <= worst)) worst = std::isnan(error) ? HUGE_VAL : error;
  }
  return worst;
}

}  // namespace quantmill::testing

#endif  // QUANTMILL_TESTS_CORE_TRAIN_SLOW_BACKWARD_H_
