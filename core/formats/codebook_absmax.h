// qm.fmt.codebook-absmax/1 (plugin_api/FORMATS.md): parameters, checks, and the slow reference
// every kernel is compared with.
#ifndef QUANTMILL_CORE_FORMATS_CODEBOOK_ABSMAX_H_
#define QUANTMILL_CORE_FORMATS_CODEBOOK_ABSMAX_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/formats/packed.h"

namespace quantmill {

inline constexpr std::string_view kCodebookAbsmaxId = "qm.fmt.codebook-absmax/1";

struct CodebookAbsmaxParams {
  enum class Type { kNf4, kFp4 };
  int64_t block_size = 64;  // a power of two, 32 .. 4096
  DType dtype = DType::kBF16;
  int64_t nested_block_size = 0;  // 0: absmax is F32; else bytes with a range per so many of them
  Type type = Type::kNf4;

  int64_t Blocks(int64_t weights) const { return (weights + block_size - 1) / block_size; }
  int64_t NestedBlocks(int64_t weights) const {
    return (Blocks(weights) + nested_block_size - 1) / nested_block_size;
  }
};

// {"block_size":64,"dtype":"bf16","type":"nf4"}
std::string CodebookAbsmaxJson(const CodebookAbsmaxParams& params);
// INVALID_ARGUMENT for a key that is missing, unknown or out of range, and for text that is not in
// canonical form.
absl::StatusOr<CodebookAbsmaxParams> ParseCodebookAbsmaxJson(std::string_view json);

// Names, dtypes, shapes, parameters and values. Tensors must be on the host.
absl::Status CheckCodebookAbsmax(const PackedWeight& weight);

// w[o, i] as FORMATS.md defines it, into F32, F16 or BF16 [out, in] host memory. Checks first.
absl::Status DequantizeCodebookAbsmaxReference(const PackedWeight& weight, Tensor* out);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_FORMATS_CODEBOOK_ABSMAX_H_
