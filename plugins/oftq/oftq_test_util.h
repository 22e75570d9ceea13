// What the tests of oftq share: calls of the table, and both kinds of adapter written out slowly in
// f64.
#ifndef QUANTMILL_PLUGINS_OFTQ_OFTQ_TEST_UTIL_H_
#define QUANTMILL_PLUGINS_OFTQ_OFTQ_TEST_UTIL_H_

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "quantmill/reparametrize.h"
#include "quantmill/testing/fake_call.hpp"

extern "C" const qm_plugin* qm_plugin_entry_v1(void);

namespace quantmill::oftq::testing {

using qm::testing::FakeCall;

inline const qm_method& Method() { return *qm_plugin_entry_v1()->methods[0]; }
inline const qm_reparametrize& Table() {
  return *static_cast<const qm_reparametrize*>(Method().ext(&Method(), QM_EXT_REPARAMETRIZE));
}

struct Setting {
  std::string method = "oft";
  int64_t in = 0, out = 0;
  int64_t block = 32, terms = 5;  // oft
  int64_t rank = 8;               // lora
  double alpha = 16;
  std::string target = "*";

  bool lora() const { return method == "lora"; }
  int64_t numbers() const { return block * (block - 1) / 2; }
  int64_t width() const { return lora() ? out : in; }  // of forward's result
};

inline void Apply(const Setting& s, FakeCall* call) {
  call->Defaults(Method())
      .Set("method", s.method)
      .Set("block", std::to_string(s.block))
      .Set("neumann_terms", std::to_string(s.terms))
      .Set("rank", std::to_string(s.rank))
      .Set("alpha", std::to_string(s.alpha))
      .Set("target", s.target);
}

// The info of one linear with a dense base.
struct Linear {
  explicit Linear(const Setting& s) {
    linear.struct_size = sizeof linear;
    linear.name = "model.layers.0.self_attn.q_proj";
    linear.role = "attn.q";
    linear.out_features = s.out;
    linear.in_features = s.in;
    linear.weight_dtype = QM_BF16;
    linear.scale_dtype = QM_F16;
    info.struct_size = sizeof info;
    info.linear = &linear;
    info.phase = QM_PHASE_END_TO_END;
  }
  Linear(const Linear&) = delete;
  Linear& operator=(const Linear&) = delete;
  qm_linear_info linear = {};
  qm_reparam_info info = {};
};

inline std::vector<float> Normal(int64_t n, uint32_t seed, float deviation = 1.0f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> out(static_cast<size_t>(n));
  for (float& x : out) x = normal(engine);
  return out;
}

// Numbers that a Python script makes with the same few lines: in [-1, 1), exact in f32.
inline std::vector<float> Sequence(int64_t n, uint32_t state) {
  std::vector<float> out;
  for (int64_t i = 0; i < n; ++i) {
    state = state * 1664525u + 1013904223u;
    out.push_back((static_cast<float>(state >> 16) - 32768.0f) / 32768.0f);
  }
  return out;
}

// The values of all parameters, in the order of the plan.
using Values = std::vector<std::vector<float>>;

inline std::vector<std::vector<int64_t>> ParamShapes(const Setting& s) {
  if (s.lora()) return {{s.rank, s.in}, {s.out, s.rank}};
  return {{s.in / s.block, s.numbers()}};
}

inline std::vector<qm_named_tensor> ParamTensors(const Setting& s, const Values& values,
                                                 FakeCall* call) {
  static constexpr const char* kLora[] = {"lora_A", "lora_B"};
  std::vector<qm_named_tensor> out;
  const auto shapes = ParamShapes(s);
  for (size_t i = 0; i < shapes.size(); ++i) {
    out.push_back({s.lora() ? kLora[i] : "oft_R", call->Tensor(values[i], shapes[i])});
  }
  return out;
}

inline Values RandomParams(const Setting& s, uint32_t seed, float deviation) {
  Values out;
  for (const auto& shape : ParamShapes(s))
    out.push_back(Normal(shape[0] * shape[1], seed++, deviation));
  return out;
}

inline int64_t SavedBytes(const Setting& s, int64_t rows) {
  return 4 * (s.lora() ? rows * s.rank : s.in * s.block);
}

struct Result {
  qm_status code = QM_OK;
  std::string error;
  std::vector<float> out, d_in;
  Values d_params;
};

// forward, and vjp with d_out unless that is empty; T: the type of x. Gradients are added to
// `start`.
template <class T>
Result Compute(const Setting& s, const std::vector<T>& x, const Values& params,
               const std::vector<float>& d_out, qm_device device = {QM_CPU, 0}, int threads = 1,
               float start = 0.0f) {
  FakeCall call(device);
  Apply(s, &call);
  call.Threads(threads);
  const int64_t rows = static_cast<int64_t>(x.size()) / s.in;
  const Linear linear(s);
  const qm_tensor in = call.Tensor(x, {rows, s.in});
  const auto theta = ParamTensors(s, params, &call);
  const bool backward = !d_out.empty();
  qm_tensor saved = {};
  if (backward)
    saved = call.Tensor(std::vector<uint8_t>(SavedBytes(s, rows)), {SavedBytes(s, rows)});
  qm_tensor out =
      call.Tensor(std::vector<T>(static_cast<size_t>(rows * s.width())), {rows, s.width()});
  Result result;
  result.code =
      Table().forward(call.get(), &linear.info, &in, theta.data(), theta.size(), saved.data, &out);
  result.error = call.error();
  if (result.code != QM_OK) return result;
  for (const T value : call.Read<T>(out)) {
    if constexpr (std::is_same_v<T, float>) {
      result.out.push_back(value);
    } else {
      result.out.push_back(qm::ToFloat(value));
    }
  }
  if (!backward) return result;
  const qm_tensor above = call.Tensor(d_out, {rows, s.width()});
  qm_tensor d_in = call.Tensor(std::vector<float>(x.size(), start), {rows, s.in});
  Values zeros = params;
  for (auto& values : zeros) values.assign(values.size(), start);
  auto d_theta = ParamTensors(s, zeros, &call);
  result.code = Table().vjp(call.get(), &linear.info, &in, theta.data(), theta.size(), saved.data,
                            &above, &d_in, d_theta.data());
  result.error = call.error();
  if (result.code != QM_OK) return result;
  result.d_in = call.Read<float>(d_in);
  for (const auto& t : d_theta) result.d_params.push_back(call.Read<float>(t.tensor));
  if (!call.CanariesIntact()) result.error = "memory behind a tensor was written";
  return result;
}

// ---- slowly, in f64 ----------------------------------------------------------------------------

using Matrix = std::vector<std::vector<double>>;

inline Matrix Identity(int64_t n) {
  Matrix out(n, std::vector<double>(n, 0.0));
  for (int64_t i = 0; i < n; ++i) out[i][i] = 1.0;
  return out;
}

inline Matrix Times(const Matrix& a, const Matrix& b) {
  Matrix out(a.size(), std::vector<double>(b[0].size(), 0.0));
  for (size_t i = 0; i < a.size(); ++i) {
    for (size_t j = 0; j < b[0].size(); ++j) {
      for (size_t k = 0; k < b.size(); ++k) out[i][j] += a[i][k] * b[k][j];
    }
  }
  return out;
}

// x a = b for x, by Gaussian elimination with pivoting on the transposed system.
inline Matrix SolveRight(const Matrix& a, const Matrix& b) {
  const size_t n = a.size();
  Matrix work(n, std::vector<double>(2 * n));
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < n; ++j) {
      work[i][j] = a[j][i];
      work[i][n + j] = b[j][i];
    }
  }
  for (size_t p = 0; p < n; ++p) {
    size_t best = p;
    for (size_t i = p; i < n; ++i) {
      if (std::fabs(work[i][p]) > std::fabs(work[best][p])) best = i;
    }
    std::swap(work[p], work[best]);
    for (size_t i = 0; i < n; ++i) {
      if (i == p) continue;
      const double factor = work[i][p] / work[p][p];
      for (size_t j = p; j < 2 * n; ++j) work[i][j] -= factor * work[p][j];
    }
  }
  Matrix out(n, std::vector<double>(n));
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < n; ++j) out[j][i] = work[i][n + j] / work[i][i];
  }
  return out;
}

// R of one block as the method's README words it: numbers in row order above the diagonal.
inline Matrix SlowRotation(const double* numbers, int64_t b, int64_t terms) {
  Matrix q(b, std::vector<double>(b, 0.0));
  for (int64_t i = 0; i < b; ++i) {
    for (int64_t j = i + 1; j < b; ++j) {
      q[i][j] = *numbers++;
      q[j][i] = -q[i][j];
    }
  }
  Matrix r = Identity(b);
  if (terms == 0) {
    Matrix plus = r, minus = r;
    for (int64_t i = 0; i < b; ++i) {
      for (int64_t j = 0; j < b; ++j) {
        plus[i][j] += q[i][j];
        minus[i][j] -= q[i][j];
      }
    }
    return SolveRight(plus, minus);
  }
  const int64_t last = terms == 2 ? 1 : std::max<int64_t>(terms - 1, 3);
  Matrix power = Identity(b);
  for (int64_t k = 1; k <= last; ++k) {
    power = Times(power, q);
    const double factor = k == last && terms > 2 ? 1.0 : 2.0;
    for (int64_t i = 0; i < b; ++i) {
      for (int64_t j = 0; j < b; ++j) r[i][j] += factor * power[i][j];
    }
  }
  return r;
}

using Doubles = std::vector<double>;

inline Doubles Widened(const std::vector<float>& values) { return {values.begin(), values.end()}; }

// What forward gives, for x [rows, in].
inline Doubles SlowForward(const Setting& s, const Doubles& x, const std::vector<Doubles>& params) {
  const int64_t rows = static_cast<int64_t>(x.size()) / s.in;
  Doubles out(static_cast<size_t>(rows * s.width()), 0.0);
  if (!s.lora()) {
    for (int64_t block = 0; block < s.in / s.block; ++block) {
      const Matrix r = SlowRotation(params[0].data() + block * s.numbers(), s.block, s.terms);
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = row * s.in + block * s.block;
        for (int64_t k = 0; k < s.block; ++k) {
          for (int64_t c = 0; c < s.block; ++c) out[at + c] += x[at + k] * r[k][c];
        }
      }
    }
    return out;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < s.rank; ++k) {
      double narrow = 0.0;
      for (int64_t i = 0; i < s.in; ++i) narrow += x[row * s.in + i] * params[0][k * s.in + i];
      for (int64_t o = 0; o < s.out; ++o) {
        out[row * s.out + o] +=
            s.alpha / static_cast<double>(s.rank) * narrow * params[1][o * s.rank + k];
      }
    }
  }
  return out;
}

// d <d_out, forward> / d variable[index] by central differences; which < 0: x, else a parameter.
inline double SlowDerivative(const Setting& s, const Doubles& x, const std::vector<Doubles>& params,
                             const Doubles& d_out, int which, size_t index) {
  constexpr double kStep = 1e-4;
  double loss[2] = {0.0, 0.0};
  for (const int side : {0, 1}) {
    Doubles moved_x = x;
    std::vector<Doubles> moved = params;
    (which < 0 ? moved_x : moved[which])[index] += side == 0 ? kStep : -kStep;
    const Doubles out = SlowForward(s, moved_x, moved);
    for (size_t i = 0; i < out.size(); ++i) loss[side] += out[i] * d_out[i];
  }
  return (loss[0] - loss[1]) / (2.0 * kStep);
}

// Root mean square.
template <class Vector>
double Size(const Vector& values) {
  double sum = 0.0;
  for (const auto value : values) sum += static_cast<double>(value) * value;
  return std::sqrt(sum / static_cast<double>(std::max<size_t>(values.size(), 1)));
}

// Rounding of a sum of `terms` in f32, relative to the size of the result; generous.
inline double SumTolerance(int64_t terms) {
  return 16.0 * 0x1p-24 * std::sqrt(static_cast<double>(terms));
}

}  // namespace quantmill::oftq::testing

#endif  // QUANTMILL_PLUGINS_OFTQ_OFTQ_TEST_UTIL_H_
