// qm.fmt.additive-codebook/1 (plugin_api/FORMATS.md): parameters, checks, and the slow reference
// every kernel is compared with.
#ifndef QUANTMILL_CORE_FORMATS_ADDITIVE_CODEBOOK_H_
#define QUANTMILL_CORE_FORMATS_ADDITIVE_CODEBOOK_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/formats/packed.h"

namespace quantmill {

inline constexpr std::string_view kAdditiveCodebookId = "qm.fmt.additive-codebook/1";

struct AdditiveCodebookParams {
  int codebooks = 2;       // vectors added up per group, 1..16
  int64_t group_size = 8;  // neighbouring input channels of a row that share a vector
  int index_bits = 8;      // of an index into a codebook of 2^index_bits vectors, 1..16

  int64_t codebook_length() const { return int64_t{1} << index_bits; }
  // Dtype of `codes`.
  DType code_dtype() const { return index_bits <= 8 ? DType::kI8 : DType::kI16; }
};

// {"codebooks":2,"group_size":8,"index_bits":8}
std::string AdditiveCodebookJson(const AdditiveCodebookParams& params);
// INVALID_ARGUMENT for a key that is missing, unknown or out of range, and for text that is not in
// canonical form.
absl::StatusOr<AdditiveCodebookParams> ParseAdditiveCodebookJson(std::string_view json);

// Names, dtypes, shapes, parameters and values (codes in range, codebooks and scales finite).
// Tensors must be on the host.
absl::Status CheckAdditiveCodebook(const PackedWeight& weight);

// w[o, i] as FORMATS.md defines it, into F32, F16 or BF16 [out, in] host memory. Checks first.
absl::Status DequantizeAdditiveCodebookReference(const PackedWeight& weight, Tensor* out);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_FORMATS_ADDITIVE_CODEBOOK_H_
