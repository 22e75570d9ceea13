// Problems, settings and a slow GPTQ in f64 for the tests of this plugin.
#ifndef QUANTMILL_PLUGINS_GPTQ_GPTQ_TESTING_H_
#define QUANTMILL_PLUGINS_GPTQ_GPTQ_TESTING_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numeric>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "quantmill/quantize_linear.h"
#include "quantmill/testing/affine_reading.hpp"
#include "quantmill/testing/fake_call.hpp"

extern "C" const qm_plugin* qm_plugin_entry_v1(void);

namespace quantmill::gptq::testing {

using qm::testing::AffineContent;
using qm::testing::FakeCall;
using qm::testing::ReadAffine;

inline const qm_method& Method() { return *qm_plugin_entry_v1()->methods[0]; }
inline const qm_quantize_linear& Table() {
  return *static_cast<const qm_quantize_linear*>(Method().ext(&Method(), QM_EXT_QUANTIZE_LINEAR));
}

struct Setting {
  int bits = 4;
  int64_t group_size = 32;
  bool symmetric = false;
  bool act_order = false;
  bool static_groups = false;
  bool clip_search = false;
  double alpha = 0.0;
  int64_t block_size = 128;
  double damp = 0.01;
  qm_dtype scale_dtype = QM_F32;
};

inline std::ostream& operator<<(std::ostream& out, const Setting& s) {
  return out << s.bits << " bits, group " << s.group_size << (s.symmetric ? ", symmetric" : "")
             << (s.act_order ? ", act-order" : "") << (s.static_groups ? ", static" : "")
             << (s.clip_search ? ", clip" : "") << ", alpha " << s.alpha << ", block "
             << s.block_size;
}

inline void Apply(const Setting& s, FakeCall* call) {
  const auto text = [](bool value) { return std::string(value ? "true" : "false"); };
  call->Defaults(Method())
      .Set("bits", std::to_string(s.bits))
      .Set("group_size", std::to_string(s.group_size))
      .Set("symmetric", text(s.symmetric))
      .Set("act_order", text(s.act_order))
      .Set("static_groups", text(s.static_groups))
      .Set("clip_search", text(s.clip_search))
      .Set("asymmetric_error", std::to_string(s.alpha))
      .Set("block_size", std::to_string(s.block_size))
      .Set("damp", std::to_string(s.damp));
}

// A layer: weights, and correlated inputs with a few strong channels.
struct Problem {
  int64_t rows = 0, cols = 0, samples = 0;
  std::vector<float> w;               // [rows, cols]
  std::vector<float> hessian, cross;  // [cols, cols]
  std::vector<double> hessian64, cross64;
};

inline Problem MakeProblem(int64_t rows, int64_t cols, int64_t samples, uint32_t seed,
                           std::vector<int64_t> dead = {}) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  Problem p;
  p.rows = rows;
  p.cols = cols;
  p.samples = samples;
  for (int64_t i = 0; i < rows * cols; ++i) {
    p.w.push_back(static_cast<float>(0.05 * normal(engine)));
  }
  std::vector<double> strength;
  for (int64_t j = 0; j < cols; ++j) strength.push_back(std::exp(0.7 * normal(engine)));
  for (const int64_t j : dead) strength[j] = 0.0;
  p.hessian64.assign(cols * cols, 0.0);
  p.cross64.assign(cols * cols, 0.0);
  std::vector<double> x(cols), dx(cols);
  for (int64_t s = 0; s < samples; ++s) {
    double previous = normal(engine);
    for (int64_t j = 0; j < cols; ++j) {  // neighbours are correlated
      previous = 0.8 * previous + 0.6 * normal(engine);
      x[j] = strength[j] * previous;
      dx[j] = 0.1 * x[j] + 0.1 * strength[j] * normal(engine);
    }
    for (int64_t i = 0; i < cols; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        p.hessian64[i * cols + j] += x[i] * x[j];
        p.cross64[i * cols + j] += dx[i] * x[j];
      }
    }
  }
  p.hessian.assign(p.hessian64.begin(), p.hessian64.end());
  p.cross.assign(p.cross64.begin(), p.cross64.end());
  return p;
}

inline qm_linear_info Info(int64_t rows, int64_t cols, qm_dtype scale_dtype = QM_F32) {
  qm_linear_info info = {};
  info.struct_size = sizeof info;
  info.name = "model.layers.0.self_attn.q_proj";
  info.role = "attn.q";
  info.out_features = rows;
  info.in_features = cols;
  info.weight_dtype = QM_BF16;
  info.scale_dtype = scale_dtype;
  return info;
}

// Statistics of a problem on a call's device.
class Stats {
 public:
  Stats(FakeCall& call, const Problem& p, bool with_cross) {
    items_[0] = {QM_STAT_HESSIAN, call.Tensor(p.hessian, {p.cols, p.cols})};
    if (with_cross) items_[1] = {QM_STAT_CROSS, call.Tensor(p.cross, {p.cols, p.cols})};
    stats_ = {sizeof(qm_stats), items_, with_cross ? 2u : 1u, p.samples};
  }
  Stats(const Stats&) = delete;
  Stats& operator=(const Stats&) = delete;
  qm_stats* get() { return &stats_; }

 private:
  qm_named_tensor items_[2];
  qm_stats stats_;
};

inline qm_status Quantize(FakeCall& call, const Setting& s, const Problem& p, qm_packed* out) {
  Stats stats(call, p, s.alpha > 0);
  const qm_linear_info info = Info(p.rows, p.cols, s.scale_dtype);
  const qm_tensor w = call.Tensor(p.w, {p.rows, p.cols});
  return Table().run(call.get(), &info, &w, stats.get(), out);
}

// sum over rows of (w - q) H (w - q)^T: the squared error of the outputs.
inline double OutputError(const Problem& p, const std::vector<double>& q) {
  double sum = 0.0;
  std::vector<double> d(p.cols);
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t c = 0; c < p.cols; ++c) d[c] = p.w[r * p.cols + c] - q[r * p.cols + c];
    for (int64_t i = 0; i < p.cols; ++i) {
      double dot = 0.0;
      for (int64_t j = 0; j < p.cols; ++j) dot += p.hessian64[i * p.cols + j] * d[j];
      sum += d[i] * dot;
    }
  }
  return sum;
}

// ---- the slow GPTQ: the steps of IST-DASLab/gptq: gptq.py in f64, GPTAQ as in GPTQModel ---------
using Matrix = std::vector<double>;  // [n, n]

inline Matrix Cholesky(const Matrix& a, int64_t n) {  // lower
  Matrix l(n * n, 0.0);
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = j; i < n; ++i) {
      double sum = a[i * n + j];
      for (int64_t k = 0; k < j; ++k) sum -= l[i * n + k] * l[j * n + k];
      l[i * n + j] = i == j ? std::sqrt(sum) : sum / l[j * n + j];
    }
  }
  return l;
}

// The inverse from the Cholesky factor, one unit vector at a time.
inline Matrix InverseFromCholesky(const Matrix& l, int64_t n) {
  Matrix inverse(n * n);
  std::vector<double> y(n);
  for (int64_t c = 0; c < n; ++c) {
    for (int64_t i = 0; i < n; ++i) {
      double sum = i == c ? 1.0 : 0.0;
      for (int64_t k = 0; k < i; ++k) sum -= l[i * n + k] * y[k];
      y[i] = sum / l[i * n + i];
    }
    for (int64_t i = n - 1; i >= 0; --i) {
      double sum = y[i];
      for (int64_t k = i + 1; k < n; ++k) sum -= l[k * n + i] * inverse[k * n + c];
      inverse[i * n + c] = sum / l[i * n + i];
    }
  }
  return inverse;
}

struct SlowGroup {
  double scale = 1.0, zero = 0.0;
};

class SlowGptq {
 public:
  SlowGptq(const Setting& s, const Problem& p)
      : s_(s), p_(p), n_(p.cols), w_(p.w.begin(), p.w.end()) {}

  AffineContent Solve() {
    Matrix h = p_.hessian64, d = p_.cross64;
    width_ = s_.group_size < 0 ? n_ : s_.group_size;
    content_.rows = p_.rows;
    content_.cols = n_;
    content_.groups = n_ / width_;
    content_.scale.resize(p_.rows * content_.groups);
    content_.zero.resize(p_.rows * content_.groups);
    content_.codes.resize(p_.rows * n_);
    const std::vector<double> untouched = w_;
    for (int64_t j = 0; j < n_; ++j) {
      if (h[j * n_ + j] != 0.0) continue;
      h[j * n_ + j] = 1.0;
      for (int64_t r = 0; r < p_.rows; ++r) w_[r * n_ + j] = 0.0;
    }
    const std::vector<double> without_dead = w_;
    Permute(&h, &d);
    double mean = 0.0;
    for (int64_t j = 0; j < n_; ++j) mean += h[j * n_ + j] / static_cast<double>(n_);
    for (int64_t j = 0; j < n_; ++j) h[j * n_ + j] += s_.damp * mean;
    const Matrix inverse = InverseFromCholesky(Cholesky(h, n_), n_);
    const Matrix lower = Cholesky(inverse, n_);
    u_.assign(n_ * n_, 0.0);
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t j = i; j < n_; ++j) u_[i * n_ + j] = lower[j * n_ + i];
    }
    if (s_.alpha > 0) MakeP(d);
    std::vector<double> by_position(n_), by_channel(n_);
    for (int64_t j = 0; j < n_; ++j) {
      by_position[j] = 1.0 / (u_[j * n_ + j] * u_[j * n_ + j]);
      by_channel[order_[j]] = by_position[j];
    }
    importance_ = by_channel;
    if (s_.group_size < 0) FindAll(untouched);
    if (s_.static_groups && s_.group_size > 0) FindAll(without_dead);
    importance_ = by_position;
    for (int64_t b = 0; b < n_; b += s_.block_size) Block(b, std::min(b + s_.block_size, n_));
    content_.group_of.resize(n_);
    for (int64_t j = 0; j < n_; ++j) {
      content_.group_of[order_[j]] = static_cast<int>((s_.static_groups ? order_[j] : j) / width_);
    }
    return content_;
  }

 private:
  void FindAll(const std::vector<double>& w) {
    for (int64_t g = 0; g < content_.groups; ++g) Find(w, g * width_, g);
  }
  SlowGroup FromRange(double lo, double hi) const {
    const double max_code = std::ldexp(1.0, s_.bits) - 1;
    const double scale = static_cast<float>((hi - lo) / max_code);
    return {scale, s_.symmetric ? (max_code + 1) / 2
                                : std::clamp(std::nearbyint(-lo / scale), 0.0, max_code)};
  }
  int Code(double x, SlowGroup g) const {
    return static_cast<int>(
        std::clamp(std::nearbyint(x / g.scale) + g.zero, 0.0, std::ldexp(1.0, s_.bits) - 1));
  }
  void Find(const std::vector<double>& w, int64_t column, int64_t g) {
    for (int64_t r = 0; r < p_.rows; ++r) {
      const double* x = w.data() + r * n_ + column;
      double lo = std::min(0.0, *std::min_element(x, x + width_));
      double hi = std::max(0.0, *std::max_element(x, x + width_));
      if (s_.symmetric) {
        hi = std::max(-lo, hi);
        lo = -hi;
      }
      if (lo == 0 && hi == 0) {
        lo = -1;
        hi = 1;
      }
      SlowGroup best;
      double best_error = INFINITY;
      for (int step = 0; step < (s_.clip_search ? 80 : 1); ++step) {
        const SlowGroup candidate = FromRange((1.0 - step / 100.0) * lo, (1.0 - step / 100.0) * hi);
        double error = 0.0;
        for (int64_t i = 0; i < width_; ++i) {
          const double e = candidate.scale * (Code(x[i], candidate) - candidate.zero) - x[i];
          error += importance_[column + i] * e * e;
        }
        if (error < best_error) {
          best_error = error;
          best = candidate;
        }
      }
      content_.scale[r * content_.groups + g] = best.scale;
      content_.zero[r * content_.groups + g] = best.zero;
    }
  }
  void Permute(Matrix* h, Matrix* d) {
    order_.resize(n_);
    std::iota(order_.begin(), order_.end(), 0);
    if (!s_.act_order) return;
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) {
      return static_cast<float>((*h)[a * n_ + a]) > static_cast<float>((*h)[b * n_ + b]);
    });
    const Matrix h0 = *h, d0 = *d;
    const std::vector<double> w0 = w_;
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t j = 0; j < n_; ++j) {
        (*h)[i * n_ + j] = h0[order_[i] * n_ + order_[j]];
        (*d)[i * n_ + j] = d0[order_[i] * n_ + order_[j]];
      }
      for (int64_t r = 0; r < p_.rows; ++r) w_[r * n_ + i] = w0[r * n_ + order_[i]];
    }
  }
  void MakeP(const Matrix& d) {
    Matrix t(n_ * n_, 0.0);
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t j = i + 1; j < n_; ++j) {
        for (int64_t k = 0; k < n_; ++k) t[i * n_ + j] += s_.alpha * d[i * n_ + k] * u_[j * n_ + k];
      }
    }
    pm_.assign(n_ * n_, 0.0);
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t k = 0; k < n_; ++k) {
        for (int64_t j = 0; j < n_; ++j) pm_[i * n_ + j] += t[i * n_ + k] * u_[k * n_ + j];
      }
    }
  }
  void Block(int64_t begin, int64_t end) {
    std::vector<double> w1 = w_, err(p_.rows * n_, 0.0);
    for (int64_t i = begin; i < end; ++i) {
      if (s_.group_size > 0 && !s_.static_groups && i % width_ == 0) Find(w_, i, i / width_);
      const int64_t g = (s_.static_groups ? order_[i] : i) / width_;
      for (int64_t r = 0; r < p_.rows; ++r) {
        const SlowGroup group = {content_.scale[r * content_.groups + g],
                                 content_.zero[r * content_.groups + g]};
        const double w = w1[r * n_ + i];
        const int code = Code(w, group);
        content_.codes[r * n_ + order_[i]] = code;
        const double e = (w - group.scale * (code - group.zero)) / u_[i * n_ + i];
        err[r * n_ + i] = e;
        for (int64_t j = i; j < end; ++j) {
          w1[r * n_ + j] -= e * u_[i * n_ + j] - (pm_.empty() ? 0.0 : w * pm_[i * n_ + j]);
        }
      }
    }
    for (int64_t r = 0; r < p_.rows; ++r) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = end; j < n_; ++j) {
          w_[r * n_ + j] -= err[r * n_ + i] * u_[i * n_ + j] -
                            (pm_.empty() ? 0.0 : w1[r * n_ + i] * pm_[i * n_ + j]);
        }
      }
    }
  }

  Setting s_;
  const Problem& p_;
  int64_t n_, width_ = 0;
  std::vector<double> w_, importance_;
  Matrix u_, pm_;
  std::vector<int64_t> order_;
  AffineContent content_;
};

// Codes that differ, of two lists of one length.
inline int64_t Mismatches(const std::vector<int>& a, const std::vector<int>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), int64_t{0}, std::plus<>(),
                            [](int x, int y) { return x != y ? 1 : 0; });
}

}  // namespace quantmill::gptq::testing

#endif  // QUANTMILL_PLUGINS_GPTQ_GPTQ_TESTING_H_
