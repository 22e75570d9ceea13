// Rounding a weight to qm.fmt.float8/1: the rule, and the loop over rows on the CPU. float8.cuh
// does the same on a GPU, with the same bits.
//
//   m = largest |w| of a row (or of all), scale = m / L rounded to its stored type, L = 448 or
//   57344 code = nearest 8-bit float to w / scale, saturated at L; m = 0: scale 1 / L, codes 0
//
// compressed-tensors: src/compressed_tensors/quantization/utils/helpers.py and
// lifecycle/forward_helpers.py.
#ifndef QUANTMILL_SDK_FLOAT8_HPP_
#define QUANTMILL_SDK_FLOAT8_HPP_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "quantmill/sdk/row8.hpp"

namespace qm {

// How a linear becomes 8-bit floats.
struct Float8Rule {
  qm_dtype code_dtype = QM_F8_E4M3;  // or QM_F8_E5M2
  bool per_tensor = false;           // one scale instead of one per row
  bool fp8_activations = false;      // products quantize their input; E4M3 only
};

// The largest value of a type.
QM_HD inline float Float8Largest(qm_dtype dtype) { return dtype == QM_F8_E4M3 ? 448.0f : 57344.0f; }

// The scale for values up to `largest`, as stored.
QM_HD inline float Float8Scale(float largest, qm_dtype code_dtype, qm_dtype scale_dtype) {
  return RoundScale((largest > 0.0f ? largest : 1.0f) / Float8Largest(code_dtype), scale_dtype);
}

// The code of a weight.
QM_HD inline uint8_t EncodeFloat8(float w, float scale, qm_dtype code_dtype) {
  return code_dtype == QM_F8_E4M3 ? ToE4M3(w / scale) : ToE5M2(w / scale);
}

// Format, parameters and tensors of the result.
inline Row8Layout Float8Layout(const qm_linear_info& info, const Float8Rule& rule) {
  return {kFloat8Format,
          StrCat("{", rule.fp8_activations ? "\"activations\":\"fp8\"," : "", "\"dtype\":\"",
                 rule.code_dtype == QM_F8_E4M3 ? "e4m3" : "e5m2", "\",\"scale\":\"",
                 rule.per_tensor ? "tensor" : "channel", "\"}"),
          rule.code_dtype,
          info.scale_dtype,
          rule.per_tensor ? 1 : info.out_features,
          info.out_features,
          info.in_features};
}

// Largest |w| of n values; NaN is passed over.
inline float LargestMagnitude(const float* w, int64_t n) {
  constexpr int kLanes = 16;
  float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lane[l] = std::max(lane[l], std::fabs(w[i + l]));
  }
  for (int l = 0; i + l < n; ++l) lane[l] = std::max(lane[l], std::fabs(w[i + l]));
  return *std::max_element(lane, lane + kLanes);
}

// Fills `largest` with the largest magnitude of each row of a weight on the host. INVALID_ARGUMENT
// names the first weight that is not finite.
inline qm_status RowMagnitudes(qm_call* call, TensorView<const float> weight,
                               std::vector<float>* largest) {
  const int64_t rows = weight.shape(0), columns = weight.shape(1);
  largest->assign(static_cast<size_t>(rows), 0.0f);
  // Index of the first bad weight, so that the message does not depend on the threads.
  std::atomic<int64_t> bad{std::numeric_limits<int64_t>::max()};
  QM_TRY(ParallelFor(call, rows, 8, [&](int64_t begin, int64_t end, int32_t) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t column = FirstNotFinite(weight.row(row), columns);
      if (column < 0) {
        (*largest)[static_cast<size_t>(row)] = LargestMagnitude(weight.row(row), columns);
        continue;
      }
      const int64_t index = row * columns + column;
      int64_t seen = bad.load();
      while (index < seen && !bad.compare_exchange_weak(seen, index)) {
      }
    }
    return Progress(call, 0.5 * static_cast<double>(end) / static_cast<double>(rows));
  }));
  if (bad == std::numeric_limits<int64_t>::max()) return QM_OK;
  return NotFinite(call, bad / columns, bad % columns);
}

// Fills codes and scale of `out` from weight [out_features, in_features] on the host.
inline qm_status QuantizeFloat8Cpu(qm_call* call, const Row8Layout& layout,
                                   TensorView<const float> weight, const Row8Tensors& out) {
  std::vector<float> largest;
  QM_TRY(RowMagnitudes(call, weight, &largest));
  const qm_dtype dtype = layout.code_dtype;
  const bool per_tensor = layout.scales == 1 && layout.out_features > 1;
  const float whole = *std::max_element(largest.begin(), largest.end());
  if (per_tensor) {
    StoreScale(out.scale.data, layout.scale_dtype, 0,
               Float8Scale(whole, dtype, layout.scale_dtype));
  }
  return ParallelFor(call, layout.out_features, 8, [&](int64_t begin, int64_t end, int32_t) {
    for (int64_t row = begin; row < end; ++row) {
      const float scale = Float8Scale(per_tensor ? whole : largest[static_cast<size_t>(row)], dtype,
                                      layout.scale_dtype);
      if (!per_tensor) StoreScale(out.scale.data, layout.scale_dtype, row, scale);
      const float* w = weight.row(row);
      uint8_t* codes = static_cast<uint8_t*>(out.codes.data) + row * layout.in_features;
      for (int64_t i = 0; i < layout.in_features; ++i) {
        codes[i] = EncodeFloat8(w[i], scale, dtype);
      }
    }
    return Progress(
        call, 0.5 + 0.5 * static_cast<double>(end) / static_cast<double>(layout.out_features));
  });
}

}  // namespace qm

#endif  // QUANTMILL_SDK_FLOAT8_HPP_
