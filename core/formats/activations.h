// Products that quantize their input: the parameter "activations" of packed formats
// (plugin_api/FORMATS.md).
#ifndef QUANTMILL_CORE_FORMATS_ACTIVATIONS_H_
#define QUANTMILL_CORE_FORMATS_ACTIVATIONS_H_

#include <string_view>

#include "absl/status/status.h"
#include "core/tensor/tensor.h"

namespace quantmill {

enum class Activations {
  kFloat,  // x as it is
  kInt8,   // each row of x as 8-bit integers with a scale
  kFp8,    // each row of x as E4M3 with a scale
};

// Of the parameters of any format, canonical JSON. Such a weight is not the same thing as its dense
// values: whoever multiplies must use the format's kernel.
Activations ActivationsOf(std::string_view format_json);

// The slow reference: x [rows, n] (F32, F16 or BF16, host) as the product sees it, into F32
// [rows, n]. A row with a value that is not finite becomes NaN.
absl::Status QuantizeActivationsReference(Activations activations, const Tensor& x, Tensor* out);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_FORMATS_ACTIVATIONS_H_
