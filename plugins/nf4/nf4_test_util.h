// Calls and random weights for the tests of this plugin.
#ifndef QUANTMILL_PLUGINS_NF4_NF4_TEST_UTIL_H_
#define QUANTMILL_PLUGINS_NF4_NF4_TEST_UTIL_H_

#include <random>
#include <string>
#include <vector>

#include "core/formats/codebook_absmax.h"
#include "quantmill/all.h"
#include "quantmill/testing/fake_call.hpp"

extern "C" const qm_plugin* qm_plugin_entry_v1(void);

namespace nf4_testing {

using qm::testing::FakeCall;
using quantmill::DType;
using quantmill::PackedWeight;
using quantmill::Tensor;

inline constexpr qm_device kHostDevice = {QM_CPU, 0};

inline const qm_method& Method() { return *qm_plugin_entry_v1()->methods[0]; }
inline const qm_quantize_linear& Quantizer() {
  return *static_cast<const qm_quantize_linear*>(Method().ext(&Method(), QM_EXT_QUANTIZE_LINEAR));
}
inline const qm_linear_kernel& Kernel() {
  return *static_cast<const qm_linear_kernel*>(Method().ext(&Method(), QM_EXT_LINEAR_KERNEL));
}
inline const qm_format& Format() {
  return *static_cast<const qm_format*>(Method().ext(&Method(), QM_EXT_FORMAT));
}

inline qm_linear_info Info(int64_t rows, int64_t columns, qm_dtype weight_dtype = QM_BF16) {
  qm_linear_info info = {};
  info.struct_size = sizeof info;
  info.name = "model.layers.0.mlp.up_proj";
  info.role = "mlp.up";
  info.out_features = rows;
  info.in_features = columns;
  info.weight_dtype = weight_dtype;
  info.scale_dtype = QM_F16;
  return info;
}

struct Setting {
  bool fp4 = false;
  int block_size = 64;
  bool double_quant = false;
};

inline FakeCall& Apply(const Setting& s, FakeCall* call) {
  return call->Defaults(Method())
      .Set("type", s.fp4 ? "fp4" : "nf4")
      .Set("block_size", std::to_string(s.block_size))
      .Set("double_quant", s.double_quant ? "true" : "false");
}

inline qm_status Quantize(FakeCall& call, const qm_linear_info& info, const std::vector<float>& w,
                          qm_packed* out) {
  const qm_tensor weight = call.Tensor(w, {info.out_features, info.in_features});
  qm_stats stats = {};
  stats.struct_size = sizeof stats;
  return Quantizer().run(call.get(), &info, &weight, &stats, out);
}

inline std::vector<float> Gaussian(int64_t n, uint32_t seed, float sigma = 0.05f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, sigma);
  std::vector<float> out(static_cast<size_t>(n));
  for (float& x : out) x = normal(engine);
  return out;
}

// A copy of what a call on the CPU emitted.
inline PackedWeight Keep(const qm_packed& packed) {
  PackedWeight weight;
  weight.format_id = packed.format_id;
  weight.format_json = packed.format_json;
  weight.out_features = packed.out_features;
  weight.in_features = packed.in_features;
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    const qm_tensor& t = packed.tensors[i].tensor;
    Tensor copy = *Tensor::Host(static_cast<DType>(t.dtype), {t.shape[0]});
    std::memcpy(copy.data(), t.data, static_cast<size_t>(copy.bytes()));
    weight.tensors.push_back({packed.tensors[i].name, copy});
  }
  return weight;
}

// Quantized on the CPU; random weights.
inline PackedWeight RandomWeight(int64_t rows, int64_t columns, const Setting& setting,
                                 uint32_t seed = 1) {
  FakeCall call;
  Apply(setting, &call);
  qm_packed packed = {};
  if (Quantize(call, Info(rows, columns), Gaussian(rows * columns, seed), &packed) != QM_OK) {
    return {};
  }
  return Keep(packed);
}

// A qm_packed over host tensors of a PackedWeight.
class View {
 public:
  explicit View(const PackedWeight& weight) {
    for (const auto& named : weight.tensors) {
      tensors_.push_back({named.name.c_str(), named.tensor.View()});
    }
    packed_ = {weight.format_id.c_str(), weight.format_json.c_str(), tensors_.data(),
               tensors_.size(),          weight.out_features,        weight.in_features};
  }
  const qm_packed* get() const { return &packed_; }

 private:
  std::vector<qm_named_tensor> tensors_;
  qm_packed packed_;
};

inline std::vector<float> ReferenceWeight(const PackedWeight& weight) {
  Tensor out = *Tensor::Host(DType::kF32, {weight.out_features, weight.in_features});
  if (!quantmill::DequantizeCodebookAbsmaxReference(weight, &out).ok()) return {};
  return {out.as<float>(), out.as<float>() + out.elements()};
}

// Shapes in which rows end inside a block, inside a byte, or nowhere in particular.
struct ShapeCase {
  int64_t rows, columns;
};
inline constexpr ShapeCase kShapes[] = {{64, 256}, {1, 1},    {1, 64},  {7, 96},    {33, 37},
                                        {5, 40},   {3, 4096}, {130, 8}, {100, 1056}};

inline std::vector<Setting> Settings() {
  std::vector<Setting> settings;
  for (const bool fp4 : {false, true}) {
    for (const bool nested : {false, true}) {
      for (const int block : {32, 64, 4096}) settings.push_back({fp4, block, nested});
    }
  }
  return settings;
}

// y = x W^T in f64, and per output the sum of |x w| that bounds the rounding error.
struct Product {
  std::vector<double> value, magnitude;
};
inline Product ReferenceProduct(const std::vector<float>& x, const std::vector<float>& w,
                                int64_t rows, int64_t in, int64_t out) {
  Product product;
  product.value.resize(static_cast<size_t>(rows * out));
  product.magnitude.resize(static_cast<size_t>(rows * out));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < out; ++o) {
      double sum = 0, magnitude = 0;
      for (int64_t i = 0; i < in; ++i) {
        const double term = static_cast<double>(x[r * in + i]) * w[o * in + i];
        sum += term;
        magnitude += std::abs(term);
      }
      product.value[r * out + o] = sum;
      product.magnitude[r * out + o] = magnitude;
    }
  }
  return product;
}

}  // namespace nf4_testing

#endif  // QUANTMILL_PLUGINS_NF4_NF4_TEST_UTIL_H_
