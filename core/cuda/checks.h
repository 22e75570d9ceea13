// Argument checks of the CUDA backend: what is wrong, in words, as INVALID_ARGUMENT.
#ifndef QUANTMILL_CORE_CUDA_CHECKS_H_
#define QUANTMILL_CORE_CUDA_CHECKS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "core/tensor/tensor.h"

namespace quantmill::cuda {

// The checks of one call of one operation on one device.
class Checker {
 public:
  Checker(absl::string_view op, Device device) : op_(op), device_(device) {}

  // INVALID_ARGUMENT "cuda <op>: <what>".
  absl::Status Invalid(absl::string_view what) const;
  // The same unless `condition`. The parts of the text are joined only then: most calls are of
  // operations of a few microseconds.
  template <typename... Parts>
  absl::Status Expect(bool condition, const Parts&... what) const {
    return condition ? absl::OkStatus() : Invalid(absl::StrCat(what...));
  }

  // On the device, of the dtype, with exactly this shape.
  absl::Status Input(absl::string_view name, const Tensor& tensor, DType dtype,
                     const Shape& shape) const;
  // On the device, F32, F16 or BF16, with exactly this shape.
  absl::Status Float(absl::string_view name, const Tensor& tensor, const Shape& shape) const;
  // On the device, F32, F16 or BF16, rank 2.
  absl::Status Matrix(absl::string_view name, const Tensor& tensor) const;
  // As Input, and not null and not read-only.
  absl::Status Output(absl::string_view name, const Tensor* tensor, DType dtype,
                      const Shape& shape) const;
  // In host memory.
  absl::Status HostInput(absl::string_view name, const Tensor& tensor, DType dtype,
                         const Shape& shape) const;
  absl::Status HostOutput(absl::string_view name, const Tensor* tensor, DType dtype,
                          const Shape& shape) const;
  // Every element of an I32 host tensor lies in [0, limit).
  absl::Status Indices(absl::string_view name, const Tensor& indices, int64_t limit) const;
  // A rank-2 float view on the device with contiguous rows and a row stride of at least the width.
  absl::Status View(absl::string_view name, const qm_tensor& view) const;

 private:
  absl::Status Where(absl::string_view name, Device actual, Device expected) const;
  absl::Status What(absl::string_view name, const Tensor& tensor, DType dtype,
                    const Shape& shape) const;
  // Not null and not read-only.
  absl::Status Writable(absl::string_view name, const Tensor* tensor) const;

  absl::string_view op_;
  Device device_;
};

// Elements between the starts of rows of a checked view, at least 1.
int64_t RowStride(const qm_tensor& view);

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_CUDA_CHECKS_H_
