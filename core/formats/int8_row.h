// qm.fmt.int8-row/1 (plugin_api/FORMATS.md): parameters, checks, and the slow reference every
// kernel is compared with.
#ifndef QUANTMILL_CORE_FORMATS_INT8_ROW_H_
#define QUANTMILL_CORE_FORMATS_INT8_ROW_H_

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/formats/packed.h"

namespace quantmill {

inline constexpr std::string_view kInt8RowId = "qm.fmt.int8-row/1";

struct Int8RowParams {
  bool int8_activations = false;
};

// {} or {"activations":"int8"}
std::string Int8RowJson(const Int8RowParams& params);
// INVALID_ARGUMENT for anything else.
absl::StatusOr<Int8RowParams> ParseInt8RowJson(std::string_view json);

// Names, dtypes, shapes, parameters, and scales that are positive and finite. Tensors must be on
// the host.
absl::Status CheckInt8Row(const PackedWeight& weight);

// w[o, i] as FORMATS.md defines it, into F32, F16 or BF16 [out, in] host memory. Checks first.
absl::Status DequantizeInt8RowReference(const PackedWeight& weight, Tensor* out);

// codes: I8 [out, in]; scale: F16, BF16 or F32 [out].
absl::StatusOr<PackedWeight> MakeInt8Row(const Int8RowParams& params, const Tensor& codes,
                                         const Tensor& scale);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_FORMATS_INT8_ROW_H_
