// The packed formats whose slow reference is in this folder. A reference needs no plugin; every
// kernel is compared with it. To add a format: its own pair of files, and a row in reference.cc.
#ifndef QUANTMILL_CORE_FORMATS_REFERENCE_H_
#define QUANTMILL_CORE_FORMATS_REFERENCE_H_

#include <memory>
#include <string_view>

#include "absl/status/status.h"
#include "core/formats/packed.h"

namespace quantmill {

struct ReferenceFormat {
  std::string_view id;  // "qm.fmt.affine-int/1"
  // Names, dtypes, shapes, parameters and values. Tensors must be on the host.
  absl::Status (*check)(const PackedWeight& weight);
  // The weight as FORMATS.md defines it, into F32, F16 or BF16 [out, in] host memory. Checks first.
  absl::Status (*dequantize)(const PackedWeight& weight, Tensor* out);
};

// Null for a format without a reference.
const ReferenceFormat* FindReferenceFormat(std::string_view format_id);

// `check` and `dequantize` of the weight's format; NOT_FOUND without a reference.
absl::Status CheckWithReference(const PackedWeight& weight);
absl::Status DequantizeWithReference(const PackedWeight& weight, Tensor* out);

// Dequantizes on the host with the reference and copies to the backend; serves no MatMul.
std::shared_ptr<PackedKernel> MakeReferencePackedKernel(Backend& backend);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_FORMATS_REFERENCE_H_
