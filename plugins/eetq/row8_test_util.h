// Random weights and views for the tests of this plugin.
#ifndef QUANTMILL_PLUGINS_EETQ_ROW8_TEST_UTIL_H_
#define QUANTMILL_PLUGINS_EETQ_ROW8_TEST_UTIL_H_

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/formats/activations.h"
#include "core/formats/float8.h"
#include "core/formats/int8_row.h"
#include "core/formats/reference.h"
#include "quantmill/all.h"
#include "quantmill/testing/fake_call.hpp"

extern "C" const qm_plugin* qm_plugin_entry_v1(void);

namespace eetq_testing {

using quantmill::DType;
using quantmill::PackedWeight;
using quantmill::Tensor;

inline const qm_method* Method(int index) { return qm_plugin_entry_v1()->methods[index]; }
inline const qm_linear_kernel* Kernel() {
  return static_cast<const qm_linear_kernel*>(Method(0)->ext(Method(0), QM_EXT_LINEAR_KERNEL));
}
// That of the weight's format.
inline const qm_format* Format(const PackedWeight& weight) {
  const int index = weight.format_id == quantmill::kInt8RowId ? 0 : 1;
  return static_cast<const qm_format*>(Method(index)->ext(Method(index), QM_EXT_FORMAT));
}

struct Spec {
  DType code = DType::kI8;  // kI8, kF8E4M3 or kF8E5M2
  int64_t out = 33, in = 192;
  DType scale_dtype = DType::kF16;
  bool per_tensor = false, activations = false;
};

inline std::vector<Spec> AllParameters(int64_t out, int64_t in, DType scale_dtype = DType::kF16) {
  std::vector<Spec> specs;
  for (const bool activations : {false, true}) {
    specs.push_back({DType::kI8, out, in, scale_dtype, false, activations});
    for (const bool per_tensor : {false, true}) {
      specs.push_back({DType::kF8E4M3, out, in, scale_dtype, per_tensor, activations});
      if (!activations) {
        specs.push_back({DType::kF8E5M2, out, in, scale_dtype, per_tensor, activations});
      }
    }
  }
  return specs;
}

// Every finite code occurs once there are 256 of them.
inline PackedWeight RandomWeight(const Spec& spec, uint32_t seed = 1) {
  std::mt19937 random(seed);
  Tensor codes = *Tensor::Host(spec.code, {spec.out, spec.in});
  uint8_t* bytes = static_cast<uint8_t*>(codes.data());
  const int largest = spec.code == DType::kI8 ? 0x7F : spec.code == DType::kF8E4M3 ? 0x7E : 0x7B;
  for (int64_t i = 0; i < codes.elements(); ++i) {
    const int code = i < 256 ? static_cast<int>(i) : static_cast<int>(random() % 256);
    bytes[i] = static_cast<uint8_t>((code & 0x7F) > largest ? code & 0x80 : code);
  }
  const int64_t scales = spec.per_tensor ? 1 : spec.out;
  Tensor scale = *Tensor::Host(spec.scale_dtype, quantmill::Shape({scales}));
  for (int64_t i = 0; i < scales; ++i) {
    quantmill::StoreFloat(scale, i, 0.001f + 0.0001f * static_cast<float>(random() % 100));
  }
  if (spec.code == DType::kI8) return *quantmill::MakeInt8Row({spec.activations}, codes, scale);
  return *quantmill::MakeFloat8({spec.code, spec.per_tensor, spec.activations}, codes, scale);
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

inline Tensor ReferenceWeight(const PackedWeight& weight, DType dtype = DType::kF32) {
  Tensor out = *Tensor::Host(dtype, {weight.out_features, weight.in_features});
  if (!quantmill::DequantizeWithReference(weight, &out).ok()) return Tensor();
  return out;
}

inline std::vector<float> RandomVector(int64_t count, uint32_t seed = 7) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

// y = x' W^T in f64, x' as the weight's products see x; per output the sum of |x' w| that bounds
// the rounding error.
struct Product {
  std::vector<double> value, magnitude;
};
inline Product ReferenceProduct(const PackedWeight& weight, const std::vector<float>& x,
                                int64_t rows) {
  const int64_t in = weight.in_features, out = weight.out_features;
  const Tensor dense = ReferenceWeight(weight);
  const Tensor input = Tensor::FromF32({rows, in}, x);
  Tensor seen = *Tensor::Host(DType::kF32, {rows, in});
  const auto activations = quantmill::ActivationsOf(weight.format_json);
  if (!quantmill::QuantizeActivationsReference(activations, input, &seen).ok()) return {};
  Product product;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < out; ++o) {
      double sum = 0, magnitude = 0;
      for (int64_t i = 0; i < in; ++i) {
        const double term =
            static_cast<double>(seen.as<float>()[r * in + i]) * dense.as<float>()[o * in + i];
        sum += term;
        magnitude += std::abs(term);
      }
      product.value.push_back(sum);
      product.magnitude.push_back(magnitude);
    }
  }
  return product;
}

}  // namespace eetq_testing

#endif  // QUANTMILL_PLUGINS_EETQ_ROW8_TEST_UTIL_H_
