// Problems, settings and slow oracles in f64 for the tests of this plugin.
#ifndef QUANTMILL_PLUGINS_AQLM_AQLM_TESTING_H_
#define QUANTMILL_PLUGINS_AQLM_AQLM_TESTING_H_

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "codebook_format.h"
#include "quantmill/all.h"
#include "quantmill/sdk/plugin.hpp"
#include "quantmill/testing/fake_call.hpp"

extern "C" const qm_plugin* qm_plugin_entry_v1(void);

namespace quantmill::aqlm::testing {

using qm::testing::FakeCall;

inline const qm_method& Method() { return *qm_plugin_entry_v1()->methods[0]; }
template <class Table>
const Table& Ext(const char* id) {
  return *static_cast<const Table*>(Method().ext(&Method(), id));
}

struct Setting {
  std::string scheme = "2x4";
  int64_t group_size = 4;
  double tolerance = 0.01;
  int beam = 1;
  int steps = 100;
  qm_dtype dtype = QM_F16;
};

inline void Apply(const Setting& s, FakeCall* call) {
  call->Defaults(Method())
      .Set("scheme", s.scheme)
      .Set("group_size", std::to_string(s.group_size))
      .Set("tolerance", std::to_string(s.tolerance))
      .Set("beam", std::to_string(s.beam))
      .Set("steps", std::to_string(s.steps));
}

inline qm_linear_info Info(int64_t out, int64_t in, qm_dtype dtype = QM_F16) {
  qm_linear_info info = {};
  info.struct_size = sizeof info;
  info.name = "model.layers.0.mlp.up_proj";
  info.role = "mlp.up";
  info.out_features = out;
  info.in_features = in;
  info.weight_dtype = QM_BF16;
  info.scale_dtype = dtype;
  return info;
}

// Weights, and the Hessian of correlated inputs of uneven strength.
struct Problem {
  int64_t out = 0, in = 0, rows = 0;
  std::vector<float> w, hessian;
};

inline Problem MakeProblem(int64_t out, int64_t in, int64_t rows, uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal;
  Problem p;
  p.out = out;
  p.in = in;
  p.rows = rows;
  for (int64_t i = 0; i < out * in; ++i) p.w.push_back(static_cast<float>(0.05 * normal(engine)));
  std::vector<double> strength(in), x(in), sum(in * in);
  for (double& s : strength) s = std::exp(0.7 * normal(engine));
  for (int64_t r = 0; r < rows; ++r) {
    double previous = normal(engine);
    for (int64_t j = 0; j < in; ++j) {
      previous = 0.8 * previous + 0.6 * normal(engine);
      x[j] = strength[j] * previous;
    }
    for (int64_t i = 0; i < in; ++i) {
      for (int64_t j = 0; j < in; ++j) sum[i * in + j] += x[i] * x[j];
    }
  }
  p.hessian.assign(sum.begin(), sum.end());
  return p;
}

inline qm_status Quantize(FakeCall& call, const Setting& s, const Problem& p, qm_packed* out) {
  const qm_named_tensor item = {QM_STAT_HESSIAN, call.Tensor(p.hessian, {p.in, p.in})};
  const qm_stats stats = {sizeof(qm_stats), &item, 1, p.rows};
  const qm_tensor weight = call.Tensor(p.w, {p.out, p.in});
  const qm_linear_info info = Info(p.out, p.in, s.dtype);
  return Ext<qm_quantize_linear>(QM_EXT_QUANTIZE_LINEAR)
      .run(call.get(), &info, &weight, &stats, out);
}

// Numbers of a float tensor.
inline std::vector<float> Floats(FakeCall& call, const qm_tensor& t) {
  std::vector<float> out;
  if (t.dtype == QM_F32) return call.Read<float>(t);
  if (t.dtype == QM_F16) {
    for (const qm::F16 v : call.Read<qm::F16>(t)) out.push_back(qm::ToFloat(v));
  } else {
    for (const qm::BF16 v : call.Read<qm::BF16>(t)) out.push_back(qm::ToFloat(v));
  }
  return out;
}

// The weight as FORMATS.md defines it.
inline std::vector<float> Dequantized(FakeCall& call, const qm_packed& packed) {
  Params p;
  std::string why;
  EXPECT_TRUE(ParseParams(packed.format_json, &p, &why)) << why;
  const qm_tensor& codes = *FindTensor(packed.tensors, packed.tensor_count, "codes");
  const std::vector<float> books =
      Floats(call, *FindTensor(packed.tensors, packed.tensor_count, "codebooks"));
  const std::vector<float> scales =
      Floats(call, *FindTensor(packed.tensors, packed.tensor_count, "scales"));
  std::vector<int> stored;
  if (codes.dtype == QM_I8) {
    for (const int8_t c : call.Read<int8_t>(codes)) stored.push_back(c);
  } else {
    for (const int16_t c : call.Read<int16_t>(codes)) stored.push_back(c);
  }
  std::vector<float> out(packed.out_features * packed.in_features);
  for (int64_t o = 0; o < packed.out_features; ++o) {
    for (int64_t i = 0; i < packed.in_features; ++i) {
      float sum = 0;
      for (int m = 0; m < p.codebooks; ++m) {
        const int64_t groups = packed.in_features / p.group_size;
        const int code = stored[(o * groups + i / p.group_size) * p.codebooks + m];
        const int index = code < 0 ? code + p.length() : code;
        sum += books[(m * p.length() + index) * p.group_size + i % p.group_size];
      }
      out[o * packed.in_features + i] = scales[o] * sum;
    }
  }
  return out;
}

// trace (a - b) H (a - b)^T.
inline double Loss(const Problem& p, const std::vector<float>& a) {
  double loss = 0;
  for (int64_t o = 0; o < p.out; ++o) {
    for (int64_t i = 0; i < p.in; ++i) {
      double inner = 0;
      for (int64_t j = 0; j < p.in; ++j) {
        inner += double{p.hessian[i * p.in + j]} * (double{p.w[o * p.in + j]} - a[o * p.in + j]);
      }
      loss += inner * (double{p.w[o * p.in + i]} - a[o * p.in + i]);
    }
  }
  return loss;
}

inline double RelativeLoss(const Problem& p, const std::vector<float>& a) {
  return Loss(p, a) / Loss(p, std::vector<float>(a.size()));
}

}  // namespace quantmill::aqlm::testing

#endif  // QUANTMILL_PLUGINS_AQLM_AQLM_TESTING_H_
