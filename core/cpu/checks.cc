#include "core/cpu/checks.h"

#include <algorithm>

#include "core/base/status.h"

namespace quantmill::cpu {
namespace {

absl::Status ExpectOnHost(absl::string_view op, absl::string_view name, Device device) {
  if (device.is_cpu()) return absl::OkStatus();
  return Invalid(op, ErrorText(absl::StrCat(name, " lies on ", DeviceName(device)),
                               "the CPU backend works on host memory", "copy it to the host"));
}

absl::Status ExpectShape(absl::string_view op, absl::string_view name, const Tensor& tensor,
                         const Shape& shape) {
  if (tensor.shape() == shape) return absl::OkStatus();
  return Invalid(op, absl::StrCat(name, " has shape ", tensor.shape().ToString(), ", expected ",
                                  shape.ToString()));
}

absl::Status ExpectDType(absl::string_view op, absl::string_view name, const Tensor& tensor,
                         DType dtype) {
  if (tensor.dtype() == dtype) return absl::OkStatus();
  return Invalid(op, absl::StrCat(name, " is ", AbslView(DTypeName(tensor.dtype())), ", expected ",
                                  AbslView(DTypeName(dtype))));
}

}  // namespace

absl::Status Invalid(absl::string_view op, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("cpu ", op, ": ", what));
}

absl::Status ExpectTensor(absl::string_view op, absl::string_view name, const Tensor& tensor,
                          DType dtype, const Shape& shape) {
  QM_RETURN_IF_ERROR(ExpectOnHost(op, name, tensor.device()));
  QM_RETURN_IF_ERROR(ExpectDType(op, name, tensor, dtype));
  return ExpectShape(op, name, tensor, shape);
}

absl::Status ExpectOutput(absl::string_view op, absl::string_view name, const Tensor* tensor,
                          DType dtype, const Shape& shape) {
  if (tensor == nullptr) return Invalid(op, absl::StrCat(name, " is null"));
  if (tensor->read_only()) return Invalid(op, absl::StrCat(name, " is read-only memory"));
  return ExpectTensor(op, name, *tensor, dtype, shape);
}

absl::Status ExpectActivation(absl::string_view op, absl::string_view name, const Tensor& tensor) {
  QM_RETURN_IF_ERROR(ExpectOnHost(op, name, tensor.device()));
  QM_RETURN_IF_ERROR(ExpectDType(op, name, tensor, DType::kF32));
  if (tensor.rank() == 2) return absl::OkStatus();
  return Invalid(op, absl::StrCat(name, " has shape ", tensor.shape().ToString(),
                                  ", expected rows and features"));
}

absl::Status ExpectWeight(absl::string_view op, absl::string_view name, const Tensor& tensor,
                          const Shape& shape) {
  QM_RETURN_IF_ERROR(ExpectOnHost(op, name, tensor.device()));
  if (!IsModelFloat(tensor.dtype())) {
    return Invalid(op, absl::StrCat(name, " is ", AbslView(DTypeName(tensor.dtype())),
                                    ", expected F32, F16 or BF16"));
  }
  return ExpectShape(op, name, tensor, shape);
}

absl::Status ExpectIndices(absl::string_view op, absl::string_view name, const Tensor& indices,
                           int64_t limit) {
  const int32_t* values = indices.as<int32_t>();
  for (int64_t i = 0; i < indices.elements(); ++i) {
    if (values[i] < 0 || values[i] >= limit) {
      return Invalid(op,
                     absl::StrCat(name, "[", i, "] is ", values[i], ", expected 0 to ", limit - 1));
    }
  }
  return absl::OkStatus();
}

absl::Status ExpectMatrixView(absl::string_view op, absl::string_view name, const qm_tensor& view,
                              std::initializer_list<DType> dtypes) {
  QM_RETURN_IF_ERROR(ExpectOnHost(op, name, Device{view.device.kind, view.device.index}));
  const DType dtype = static_cast<DType>(view.dtype);
  if (std::find(dtypes.begin(), dtypes.end(), dtype) == dtypes.end()) {
    return Invalid(
        op, absl::StrCat(name, " is ", AbslView(DTypeName(dtype)), ", which is not supported"));
  }
  if (view.rank != 2) return Invalid(op, absl::StrCat(name, " has rank ", view.rank, ", not 2"));
  const int64_t rows = view.shape[0], width = view.shape[1];
  if (rows < 0 || width < 0) return Invalid(op, absl::StrCat(name, " has a negative extent"));
  if (rows == 0 || width == 0) return absl::OkStatus();
  if (view.data == nullptr) return Invalid(op, absl::StrCat(name, " has no data"));
  if (width > 1 && view.stride[1] != 1) {
    return Invalid(op, absl::StrCat(name, " has column stride ", view.stride[1],
                                    "; its rows must be contiguous"));
  }
  if (rows > 1 && view.stride[0] < width) {
    return Invalid(op, absl::StrCat(name, " has row stride ", view.stride[0],
                                    ", less than its width ", width));
  }
  return absl::OkStatus();
}

int64_t RowStride(const qm_tensor& view) {
  return std::max<int64_t>({1, view.stride[0], view.shape[1]});
}

}  // namespace quantmill::cpu
