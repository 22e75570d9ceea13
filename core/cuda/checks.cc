#include "core/cuda/checks.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"

namespace quantmill::cuda {

absl::Status Checker::Invalid(absl::string_view what) const {
  return absl::InvalidArgumentError(absl::StrCat("cuda ", op_, ": ", what));
}

absl::Status Checker::Where(absl::string_view name, Device actual, Device expected) const {
  if (actual == expected) return absl::OkStatus();
  return Invalid(
      absl::StrCat(name, " lies on ", DeviceName(actual), ", expected on ", DeviceName(expected)));
}

absl::Status Checker::What(absl::string_view name, const Tensor& tensor, DType dtype,
                           const Shape& shape) const {
  if (tensor.dtype() != dtype) {
    return Invalid(absl::StrCat(name, " is ", AbslView(DTypeName(tensor.dtype())), ", expected ",
                                AbslView(DTypeName(dtype))));
  }
  if (tensor.shape() == shape) return absl::OkStatus();
  return Invalid(absl::StrCat(name, " has shape ", tensor.shape().ToString(), ", expected ",
                              shape.ToString()));
}

absl::Status Checker::Writable(absl::string_view name, const Tensor* tensor) const {
  QM_RETURN_IF_ERROR(Expect(tensor != nullptr, name, " is null"));
  return Expect(!tensor->read_only(), name, " is read-only memory");
}

absl::Status Checker::Input(absl::string_view name, const Tensor& tensor, DType dtype,
                            const Shape& shape) const {
  QM_RETURN_IF_ERROR(Where(name, tensor.device(), device_));
  return What(name, tensor, dtype, shape);
}

absl::Status Checker::Float(absl::string_view name, const Tensor& tensor,
                            const Shape& shape) const {
  if (!IsModelFloat(tensor.dtype())) {
    return Invalid(absl::StrCat(name, " is ", AbslView(DTypeName(tensor.dtype())),
                                ", expected F32, F16 or BF16"));
  }
  return Input(name, tensor, tensor.dtype(), shape);
}

absl::Status Checker::Matrix(absl::string_view name, const Tensor& tensor) const {
  if (tensor.rank() != 2) {
    return Invalid(
        absl::StrCat(name, " has shape ", tensor.shape().ToString(), ", expected two dimensions"));
  }
  return Float(name, tensor, tensor.shape());
}

absl::Status Checker::Output(absl::string_view name, const Tensor* tensor, DType dtype,
                             const Shape& shape) const {
  QM_RETURN_IF_ERROR(Writable(name, tensor));
  return Input(name, *tensor, dtype, shape);
}

absl::Status Checker::HostInput(absl::string_view name, const Tensor& tensor, DType dtype,
                                const Shape& shape) const {
  QM_RETURN_IF_ERROR(Where(name, tensor.device(), Device{}));
  return What(name, tensor, dtype, shape);
}

absl::Status Checker::HostOutput(absl::string_view name, const Tensor* tensor, DType dtype,
                                 const Shape& shape) const {
  QM_RETURN_IF_ERROR(Writable(name, tensor));
  return HostInput(name, *tensor, dtype, shape);
}

absl::Status Checker::Indices(absl::string_view name, const Tensor& indices, int64_t limit) const {
  const int32_t* values = indices.as<int32_t>();
  for (int64_t i = 0; i < indices.elements(); ++i) {
    if (values[i] < 0 || values[i] >= limit) {
      return Invalid(absl::StrCat(name, "[", i, "] is ", values[i], ", expected 0 to ", limit - 1));
    }
  }
  return absl::OkStatus();
}

absl::Status Checker::View(absl::string_view name, const qm_tensor& view) const {
  QM_RETURN_IF_ERROR(Where(name, Device{view.device.kind, view.device.index}, device_));
  const DType dtype = static_cast<DType>(view.dtype);
  QM_RETURN_IF_ERROR(Expect(IsModelFloat(dtype), name, " is ", AbslView(DTypeName(dtype)),
                            ", expected F32, F16 or BF16"));
  QM_RETURN_IF_ERROR(Expect(view.rank == 2, name, " has rank ", view.rank, ", not 2"));
  const int64_t rows = view.shape[0];
  const int64_t width = view.shape[1];
  QM_RETURN_IF_ERROR(Expect(rows >= 0 && width >= 0, name, " has a negative extent"));
  if (rows == 0 || width == 0) return absl::OkStatus();
  QM_RETURN_IF_ERROR(Expect(view.data != nullptr, name, " has no data"));
  QM_RETURN_IF_ERROR(Expect(width == 1 || view.stride[1] == 1, name, " has column stride ",
                            view.stride[1], "; its rows must be contiguous"));
  return Expect(rows == 1 || view.stride[0] >= width, name, " has row stride ", view.stride[0],
                ", less than its width ", width);
}

int64_t RowStride(const qm_tensor& view) {
  return std::max<int64_t>({1, view.stride[0], view.shape[1]});
}

}  // namespace quantmill::cuda
