// Argument checks of the CPU backend: what is wrong, in words, as INVALID_ARGUMENT.
#ifndef QUANTMILL_CORE_CPU_CHECKS_H_
#define QUANTMILL_CORE_CPU_CHECKS_H_

#include <cstdint>
#include <initializer_list>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "core/tensor/tensor.h"

namespace quantmill::cpu {

// INVALID_ARGUMENT "cpu <op>: <what>".
absl::Status Invalid(absl::string_view op, absl::string_view what);
// The same unless `condition`. The parts of the text are joined only then: most calls are of
// operations of a few microseconds.
template <typename... Parts>
absl::Status Expect(bool condition, absl::string_view op, const Parts&... what) {
  return condition ? absl::OkStatus() : Invalid(op, absl::StrCat(what...));
}

// Host memory, of the dtype, with exactly this shape.
absl::Status ExpectTensor(absl::string_view op, absl::string_view name, const Tensor& tensor,
                          DType dtype, const Shape& shape);
// The same, and not null and not read-only.
absl::Status ExpectOutput(absl::string_view op, absl::string_view name, const Tensor* tensor,
                          DType dtype, const Shape& shape);
// Host memory, rank 2, F32.
absl::Status ExpectActivation(absl::string_view op, absl::string_view name, const Tensor& tensor);
// Host memory, F32, F16 or BF16, with exactly this shape.
absl::Status ExpectWeight(absl::string_view op, absl::string_view name, const Tensor& tensor,
                          const Shape& shape);
// Every index of an I32 tensor lies in [0, limit).
absl::Status ExpectIndices(absl::string_view op, absl::string_view name, const Tensor& indices,
                           int64_t limit);

// A rank-2 view in host memory whose rows are contiguous and whose row stride is at least the
// width.
absl::Status ExpectMatrixView(absl::string_view op, absl::string_view name, const qm_tensor& view,
                              std::initializer_list<DType> dtypes);
// Elements between the starts of rows of a checked view, at least 1.
int64_t RowStride(const qm_tensor& view);

}  // namespace quantmill::cpu

#endif  // QUANTMILL_CORE_CPU_CHECKS_H_
