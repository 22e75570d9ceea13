// Random weights and views for the tests of this plugin.
#ifndef QUANTMILL_PLUGINS_AFFINE_AFFINE_TEST_UTIL_H_
#define QUANTMILL_PLUGINS_AFFINE_AFFINE_TEST_UTIL_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/formats/affine_int.h"
#include "quantmill/all.h"
#include "quantmill/testing/fake_call.hpp"

extern "C" const qm_plugin* qm_plugin_entry_v1(void);

namespace affine_testing {

using quantmill::AffineIntParams;
using quantmill::DType;
using quantmill::PackedWeight;
using quantmill::Tensor;

inline const qm_method* Method() { return qm_plugin_entry_v1()->methods[0]; }
inline const qm_linear_kernel* Kernel() {
  return static_cast<const qm_linear_kernel*>(Method()->ext(Method(), QM_EXT_LINEAR_KERNEL));
}
inline const qm_format* Format() {
  return static_cast<const qm_format*>(Method()->ext(Method(), QM_EXT_FORMAT));
}

struct WeightSpec {
  int64_t out = 32, in = 128;
  AffineIntParams params;
  DType scale_dtype = DType::kF16;
  bool group_index = false;
  int smallest_zero = 0;
};

inline void StoreFloat(Tensor* t, int64_t i, float value) {
  if (t->dtype() == DType::kF32) t->as<float>()[i] = value;
  if (t->dtype() == DType::kF16) t->as<uint16_t>()[i] = quantmill::F32ToF16(value);
  if (t->dtype() == DType::kBF16) t->as<uint16_t>()[i] = quantmill::F32ToBF16(value);
}

inline PackedWeight RandomWeight(const WeightSpec& spec, uint32_t seed = 1) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(0, 1);
  const int codes_count = 1 << spec.params.bits;
  const quantmill::Shape group_shape = spec.params.GroupShape(spec.out, spec.in);
  const int64_t groups = spec.params.Groups(spec.in);
  Tensor codes = *Tensor::Host(DType::kU8, {spec.out, spec.in});
  for (int64_t i = 0; i < codes.elements(); ++i) {
    codes.as<uint8_t>()[i] = static_cast<uint8_t>(random() % codes_count);
  }
  const auto bytes = [&] {
    Tensor t = *Tensor::Host(DType::kU8, group_shape);
    for (int64_t i = 0; i < t.elements(); ++i) t.as<uint8_t>()[i] = random() % 256;
    return t;
  };
  Tensor scale, scale_range;
  if (spec.params.q8_scale) {
    scale = bytes();
    const int64_t ranges = (scale.elements() + quantmill::kQ8Block - 1) / quantmill::kQ8Block;
    scale_range = *Tensor::Host(DType::kF32, {ranges, 2});
    for (int64_t i = 0; i < 2 * ranges; ++i) {
      scale_range.as<float>()[i] = (i % 2 == 0 ? 2e-5f : 1e-3f) * (1 + uniform(random));
    }
  } else {
    scale = *Tensor::Host(spec.scale_dtype, group_shape);
    for (int64_t i = 0; i < scale.elements(); ++i) {
      StoreFloat(&scale, i, 0.001f + 0.01f * uniform(random));
    }
  }
  Tensor zero, zero_range, group_index;
  if (spec.params.zero == AffineIntParams::Zero::kInt) {
    zero = *Tensor::Host(DType::kU8, {spec.out, groups});
    for (int64_t i = 0; i < zero.elements(); ++i) {
      zero.as<uint8_t>()[i] =
          static_cast<uint8_t>(spec.smallest_zero + random() % (codes_count - spec.smallest_zero));
    }
  } else if (spec.params.zero == AffineIntParams::Zero::kFloat) {
    zero = *Tensor::Host(spec.scale_dtype, group_shape);
    for (int64_t i = 0; i < zero.elements(); ++i) {
      StoreFloat(&zero, i, uniform(random) * static_cast<float>(codes_count));
    }
  }
  if (spec.params.zero == AffineIntParams::Zero::kQ8) {
    zero = bytes();
    zero_range = Tensor::FromF32({1, 2}, {static_cast<float>(codes_count) / 256, -0.3f});
  }
  if (spec.group_index) {
    std::vector<int32_t> index(spec.in);
    for (int64_t i = 0; i < spec.in; ++i) index[i] = static_cast<int32_t>(i * groups / spec.in);
    std::shuffle(index.begin(), index.end(), random);
    group_index = Tensor::FromI32({spec.in}, index);
  }
  return *quantmill::MakeAffineInt(spec.params, codes, scale, zero, group_index, scale_range,
                                   zero_range);
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
  if (!quantmill::DequantizeAffineIntReference(weight, &out).ok()) return {};
  return {out.as<float>(), out.as<float>() + out.elements()};
}

inline std::vector<float> RandomVector(int64_t count, uint32_t seed = 7) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// y = x W^T in f64, and per output the sum of |x w| that bounds the rounding error.
struct Product {
  std::vector<double> value, magnitude;
};
inline Product ReferenceProduct(const std::vector<float>& x, const std::vector<float>& w,
                                int64_t rows, int64_t in, int64_t out) {
  Product product;
  product.value.resize(rows * out);
  product.magnitude.resize(rows * out);
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

}  // namespace affine_testing

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_TEST_UTIL_H_
