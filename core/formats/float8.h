// qm.fmt.float8/1 (plugin_api/FORMATS.md): the two 8-bit float types, parameters, checks, and the
// slow reference every kernel is compared with.
#ifndef QUANTMILL_CORE_FORMATS_FLOAT8_H_
#define QUANTMILL_CORE_FORMATS_FLOAT8_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/formats/packed.h"

namespace quantmill {

inline constexpr std::string_view kFloat8Id = "qm.fmt.float8/1";

// `type`: kF8E4M3 or kF8E5M2.
float Float8ToF32(DType type, uint8_t bits);
// Nearest, ties to even; beyond the largest finite value (448, 57344) that value; NaN stays a NaN.
uint8_t F32ToFloat8(DType type, float value);

struct Float8Params {
  DType dtype = DType::kF8E4M3;
  bool per_tensor = false;       // one scale instead of one per row
  bool fp8_activations = false;  // E4M3 only
};

// {"dtype":"e4m3","scale":"channel"}
std::string Float8Json(const Float8Params& params);
// INVALID_ARGUMENT for anything that is not canonical.
absl::StatusOr<Float8Params> ParseFloat8Json(std::string_view json);

// Names, dtypes, shapes, parameters, codes that are finite, scales that are positive and finite.
// Tensors must be on the host.
absl::Status CheckFloat8(const PackedWeight& weight);

// w[o, i] as FORMATS.md defines it, into F32, F16 or BF16 [out, in] host memory. Checks first.
absl::Status DequantizeFloat8Reference(const PackedWeight& weight, Tensor* out);

// codes: of params.dtype, [out, in]; scale: F16, BF16 or F32, [out] or [1].
absl::StatusOr<PackedWeight> MakeFloat8(const Float8Params& params, const Tensor& codes,
                                        const Tensor& scale);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_FORMATS_FLOAT8_H_
