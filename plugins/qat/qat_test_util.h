// What the tests of qat share: made-up linears, calls of the table, and fake quantization written
// out slowly from the formulas of README.md.
#ifndef QUANTMILL_PLUGINS_QAT_QAT_TEST_UTIL_H_
#define QUANTMILL_PLUGINS_QAT_QAT_TEST_UTIL_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "quantmill/reparametrize.h"
#include "quantmill/testing/affine_reading.hpp"
#include "quantmill/testing/fake_call.hpp"

extern "C" const qm_plugin* qm_plugin_entry_v1(void);

namespace quantmill::qat::testing {

using qm::testing::FakeCall;

inline const qm_method& Method() { return *qm_plugin_entry_v1()->methods[0]; }
inline const qm_reparametrize& Table() {
  return *static_cast<const qm_reparametrize*>(Method().ext(&Method(), QM_EXT_REPARAMETRIZE));
}

struct Setting {
  int bits = 4;
  int64_t group_size = 128;
  bool symmetric = false;
  qm_dtype scale_dtype = QM_F16;
  std::string init = "mse";
  int64_t rows = 6, cols = 384;

  int64_t width() const { return group_size < 0 ? cols : group_size; }
  int64_t groups() const { return cols / width(); }
  int64_t all_groups() const { return rows * groups(); }
  float max_code() const { return std::ldexp(1.0f, bits) - 1.0f; }
};

inline void Apply(const Setting& s, FakeCall* call) {
  call->Defaults(Method())
      .Set("bits", std::to_string(s.bits))
      .Set("group_size", std::to_string(s.group_size))
      .Set("symmetric", s.symmetric ? "true" : "false")
      .Set("init", s.init);
}

// The info of one linear; base is set by the test.
struct Linear {
  explicit Linear(const Setting& s, qm_reparam_phase phase = QM_PHASE_BLOCK) {
    linear.struct_size = sizeof linear;
    linear.name = "model.layers.0.mlp.up_proj";
    linear.role = "mlp.up";
    linear.out_features = s.rows;
    linear.in_features = s.cols;
    linear.weight_dtype = QM_BF16;
    linear.scale_dtype = s.scale_dtype;
    info.struct_size = sizeof info;
    info.linear = &linear;
    info.phase = phase;
  }
  qm_linear_info linear = {};
  qm_reparam_info info = {};
};

inline std::vector<float> Normal(int64_t n, uint32_t seed, float deviation = 0.05f,
                                 float mean = 0.0f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(mean, deviation);
  std::vector<float> out(static_cast<size_t>(n));
  for (float& x : out) x = normal(engine);
  return out;
}

// Values of the parameters of one linear.
struct State {
  std::vector<float> factor, zero, scale_init;
};

// The parameters as tensors of a call, in the order of the plan.
inline std::vector<qm_named_tensor> Tensors(FakeCall& call, const Setting& s, const State& state) {
  const std::vector<int64_t> shape = {s.rows, s.groups()};
  std::vector<qm_named_tensor> out = {{"scale_factor", call.Tensor(state.factor, shape)}};
  if (!s.symmetric) out.push_back({"zero", call.Tensor(state.zero, shape)});
  out.push_back({"scale_init", call.Tensor(state.scale_init, shape)});
  return out;
}

inline State ReadState(FakeCall& call, const std::vector<qm_named_tensor>& tensors) {
  State out;
  for (const qm_named_tensor& named : tensors) {
    const std::string name = named.name;
    auto& to = name == "zero" ? out.zero : name == "scale_init" ? out.scale_init : out.factor;
    to = call.Read<float>(named.tensor);
  }
  return out;
}

inline State Filled(const Setting& s, float value) {
  const std::vector<float> all(static_cast<size_t>(s.all_groups()), value);
  return {all, s.symmetric ? std::vector<float>() : all, all};
}

inline qm_status Init(FakeCall& call, const Linear& linear, const Setting& s,
                      const std::vector<float>& w, State* out) {
  const qm_tensor weight = call.Tensor(w, {s.rows, s.cols});
  std::vector<qm_named_tensor> params = Tensors(call, s, Filled(s, -77.0f));
  const qm_status code =
      Table().init(call.get(), &linear.info, &weight, nullptr, params.data(), params.size());
  if (code == QM_OK) *out = ReadState(call, params);
  return code;
}

// forward with a result of type T.
template <class T>
qm_status Forward(FakeCall& call, const Setting& s, const std::vector<float>& w, const State& state,
                  std::vector<T>* out) {
  const Linear linear(s);
  const qm_tensor in = call.Tensor(w, {s.rows, s.cols});
  const std::vector<qm_named_tensor> params = Tensors(call, s, state);
  qm_tensor result = call.Tensor(std::vector<T>(w.size()), {s.rows, s.cols});
  const qm_status code = Table().forward(call.get(), &linear.info, &in, params.data(),
                                         params.size(), nullptr, &result);
  if (code == QM_OK) *out = call.Read<T>(result);
  return code;
}

struct Slopes {
  std::vector<float> weight;
  State params;
};

// vjp onto gradients that hold `start`.
inline qm_status Vjp(FakeCall& call, const Setting& s, const std::vector<float>& w,
                     const State& state, const std::vector<float>& above, float start,
                     Slopes* out) {
  const Linear linear(s);
  const qm_tensor in = call.Tensor(w, {s.rows, s.cols});
  const qm_tensor d_out = call.Tensor(above, {s.rows, s.cols});
  const std::vector<qm_named_tensor> params = Tensors(call, s, state);
  qm_tensor d_in = call.Tensor(std::vector<float>(w.size(), start), {s.rows, s.cols});
  std::vector<qm_named_tensor> d_params = Tensors(call, s, Filled(s, start));
  d_params.back().tensor.data = nullptr;  // not trained
  const qm_status code = Table().vjp(call.get(), &linear.info, &in, params.data(), params.size(),
                                     nullptr, &d_out, &d_in, d_params.data());
  if (code != QM_OK) return code;
  d_params.pop_back();
  *out = {call.Read<float>(d_in), ReadState(call, d_params)};
  return code;
}

inline qm_status Finalize(FakeCall& call, const Setting& s, const std::vector<float>& w,
                          const State& state, qm_packed* out) {
  const Linear linear(s);
  const qm_tensor in = call.Tensor(w, {s.rows, s.cols});
  const std::vector<qm_named_tensor> params = Tensors(call, s, state);
  return Table().finalize(call.get(), &linear.info, &in, params.data(), params.size(), out);
}

// ---- the slow reference ------------------------------------------------------------------------
// Nearest number of the type, neither 0 nor infinite.
inline float StoredScale(qm_dtype dtype, float x) {
  if (dtype == QM_F32) return x;
  const int digits = dtype == QM_F16 ? 11 : 8, least = dtype == QM_F16 ? -24 : -133;
  int exponent;
  std::frexp(x, &exponent);
  const double step = std::ldexp(1.0, std::max(exponent - digits, least));
  const double rounded = std::nearbyint(x / step) * step;
  return static_cast<float>(
      rounded == 0.0 ? step : std::min(rounded, dtype == QM_F16 ? 65504.0 : 3.3895313892515355e38));
}

struct SlowCell {
  double scale, zero;  // of the grid
  double quotient;     // w / s as f32 divides
  double code;         // clamped
  bool inside;         // not clamped
};

inline SlowCell Slow(const Setting& s, const State& state, int64_t index, float w) {
  const size_t at = static_cast<size_t>(index);
  const float factor = std::clamp(state.factor[at], 1.0f / 64, 64.0f);
  const float scale = StoredScale(s.scale_dtype, factor * state.scale_init[at]);
  const double zero = s.symmetric ? std::ldexp(1.0, s.bits - 1)
                                  : std::clamp(std::nearbyint(static_cast<double>(state.zero[at])),
                                               0.0, static_cast<double>(s.max_code()));
  const double quotient = w / scale;
  const double unclamped = std::nearbyint(quotient) + zero;
  const double code = std::clamp(unclamped, 0.0, static_cast<double>(s.max_code()));
  return {scale, zero, quotient, code, code == unclamped};
}

// Trained values: weights beyond both ends of the grid, factors around 1 and beyond their limits,
// zero points beyond the codes.
inline State Trained(const Setting& s, uint32_t seed) {
  const int64_t n = s.all_groups();
  State out = {Normal(n, seed, 0.2f, 1.0f), {}, Normal(n, seed + 1, 0.002f, 0.02f)};
  for (float& x : out.scale_init) x = std::max(std::fabs(x), 1e-3f);
  if (!s.symmetric) out.zero = Normal(n, seed + 2, s.max_code() / 3.0f, s.max_code() / 2.0f);
  out.factor[0] = -1.0f;  // held at 1/64
  if (n > 1) out.factor[1] = 100.0f;
  if (n > 2 && !s.symmetric) out.zero[2] = -3.0f;
  if (n > 3 && !s.symmetric) out.zero[3] = s.max_code() + 9.0f;
  return out;
}

}  // namespace quantmill::qat::testing

#endif  // QUANTMILL_PLUGINS_QAT_QAT_TEST_UTIL_H_
