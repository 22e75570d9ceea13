// A linear's weight in a packed format, and who can compute with it. Formats are described in
// plugin_api/FORMATS.md.
#ifndef QUANTMILL_CORE_FORMATS_PACKED_H_
#define QUANTMILL_CORE_FORMATS_PACKED_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/tensor/backend.h"
#include "core/tensor/tensor.h"

namespace quantmill {

struct PackedWeight {
  std::string format_id;    // "qm.fmt.affine-int/1"
  std::string format_json;  // canonical: keys sorted, no spaces
  std::vector<NamedTensor> tensors;
  int64_t out_features = 0;
  int64_t in_features = 0;

  // Null if there is no such tensor.
  const Tensor* Find(std::string_view name) const;
  // All bits stored, over the number of weights.
  double BitsPerWeight() const;
  int64_t bytes() const;
};

// Computes with packed weights of one format on one backend. Implemented by the host over
// qm.linear-kernel plugins; MakeReferencePackedKernel (reference.h) needs none.
class PackedKernel {
 public:
  virtual ~PackedKernel() = default;
  // Fills out [out, in] (F32, F16 or BF16, on the backend's device).
  virtual absl::Status Dequantize(const PackedWeight& weight, Tensor* out) = 0;
  // The layout MatMul likes best; `weight` itself where there is none.
  virtual absl::StatusOr<PackedWeight> Prepack(const PackedWeight& weight) = 0;
  // out[rows, n] = x W^T. UNIMPLEMENTED for shapes it does not serve: dequantize instead.
  virtual absl::Status MatMul(const PackedWeight& weight, const Tensor& x, Tensor* out) = 0;
};

// What the core needs to know of formats it has no code for. Implemented by the host over plugins.
class FormatRegistry {
 public:
  virtual ~FormatRegistry() = default;
  // The best kernel for this format on this backend; NOT_FOUND says which plugins were asked.
  virtual absl::StatusOr<std::shared_ptr<PackedKernel>> Kernel(const PackedWeight& weight,
                                                               Backend& backend) = 0;
  // Checks names, dtypes, shapes and parameters.
  virtual absl::Status Check(const PackedWeight& weight) = 0;
  // Can `target` ("gptq", ...) hold such a weight?
  virtual absl::Status CanStore(std::string_view target, std::string_view format_id,
                                std::string_view format_json, int64_t out_features,
                                int64_t in_features) = 0;
  struct Stored {
    std::vector<NamedTensor> tensors;  // names without the layer prefix
    std::string config_json;           // per-layer parameters of the target
  };
  virtual absl::StatusOr<Stored> ToCheckpoint(std::string_view target, std::string_view layer,
                                              const PackedWeight& weight) = 0;
  virtual absl::StatusOr<PackedWeight> FromCheckpoint(std::string_view target,
                                                      std::string_view layer,
                                                      const Stored& stored) = 0;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_FORMATS_PACKED_H_
