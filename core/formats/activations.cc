#include "core/formats/activations.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/formats/float8.h"
#include "core/tensor/dtype.h"

namespace quantmill {
namespace {

// The value nearest to x / scale of the type, times scale. nearbyint rounds ties to even.
float Quantize(Activations activations, float x, float scale) {
  if (activations == Activations::kInt8) {
    return scale * std::nearbyint(std::clamp(x / scale, -128.0f, 127.0f));
  }
  return scale * Float8ToF32(DType::kF8E4M3, F32ToFloat8(DType::kF8E4M3, x / scale));
}

}  // namespace

Activations ActivationsOf(std::string_view format_json) {
  if (format_json.find(R"("activations":"int8")") != std::string_view::npos) {
    return Activations::kInt8;
  }
  if (format_json.find(R"("activations":"fp8")") != std::string_view::npos) {
    return Activations::kFp8;
  }
  return Activations::kFloat;
}

absl::Status QuantizeActivationsReference(Activations activations, const Tensor& x, Tensor* out) {
  if (x.rank() != 2 || !IsModelFloat(x.dtype()) || out->dtype() != DType::kF32 ||
      !(out->shape() == x.shape()) || !x.device().is_cpu() || !out->device().is_cpu()) {
    return absl::InvalidArgumentError(
        "activations to quantize must be a float matrix on the host, the result one in F32");
  }
  const int64_t rows = x.dim(0), n = x.dim(1);
  for (int64_t r = 0; r < rows; ++r) {
    float largest = 0;
    bool finite = true;
    for (int64_t i = 0; i < n; ++i) {
      const float value = LoadFloat(x, r * n + i);
      finite = finite && std::isfinite(value);
      largest = std::max(largest, std::fabs(value));
    }
    float scale = largest / (activations == Activations::kInt8 ? 127.5f : 448.0f);
    if (scale == 0) scale = 1;
    for (int64_t i = 0; i < n; ++i) {
      const float value = LoadFloat(x, r * n + i);
      float* target = out->as<float>() + r * n + i;
      if (activations == Activations::kFloat) {
        *target = value;
      } else {
        *target =
            finite ? Quantize(activations, value, scale) : std::numeric_limits<float>::quiet_NaN();
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace quantmill
