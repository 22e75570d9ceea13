// A linear with Gaussian weights, quantized by the first method of the plugin that the test links.
#ifndef QUANTMILL_TESTING_FAKE_LINEAR_HPP_
#define QUANTMILL_TESTING_FAKE_LINEAR_HPP_

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "quantmill/quantize_linear.h"
#include "quantmill/testing/fake_call.hpp"

extern "C" const qm_plugin* qm_plugin_entry_v1(void);

namespace qm::testing {

// A layer to quantize; see the top of the file.
class FakeLinear {
 public:
  // Weights [rows, cols] of standard deviation 0.02, the same for the same seed.
  FakeLinear(int64_t rows, int64_t cols, uint32_t seed = 1) {
    info_.struct_size = sizeof info_;
    info_.name = "model.layers.0.mlp.up_proj";
    info_.role = "mlp.up";
    info_.out_features = rows;
    info_.in_features = cols;
    info_.weight_dtype = QM_BF16;
    info_.scale_dtype = QM_F16;
    std::mt19937 engine(seed);
    for (int64_t i = 0; i < rows * cols; i += 2) {  // Box-Muller: the same in every library
      const double u = (engine() + 1.0) * 0x1p-32, v = engine() * 0x1p-32;
      const double radius = 0.02 * std::sqrt(-2.0 * std::log(u));
      weights_.push_back(static_cast<float>(radius * std::cos(6.283185307179586 * v)));
      weights_.push_back(static_cast<float>(radius * std::sin(6.283185307179586 * v)));
    }
    weights_.resize(static_cast<size_t>(rows * cols));
  }

  // The method under test.
  const qm_method& method() const { return *qm_plugin_entry_v1()->methods[0]; }
  // What the method is told; tests may change it.
  qm_linear_info& info() { return info_; }
  // Row-major; tests may change them.
  std::vector<float>& weights() { return weights_; }

  // Calls plan.
  qm_status Plan(FakeCall& call, qm_quant_plan* out) const {
    *out = {};
    out->struct_size = sizeof *out;
    return table().plan(call.get(), &info_, out);
  }
  // *out lives as long as the call.
  qm_status Run(FakeCall& call, qm_packed* out) const {
    const qm_tensor weight = call.Tensor(weights_, {info_.out_features, info_.in_features});
    qm_stats stats = {};
    stats.struct_size = sizeof stats;
    return table().run(call.get(), &info_, &weight, &stats, out);
  }

 private:
  const qm_quantize_linear& table() const {
    return *static_cast<const qm_quantize_linear*>(method().ext(&method(), QM_EXT_QUANTIZE_LINEAR));
  }

  qm_linear_info info_ = {};
  std::vector<float> weights_;
};

}  // namespace qm::testing

#endif  // QUANTMILL_TESTING_FAKE_LINEAR_HPP_
