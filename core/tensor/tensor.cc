#include "core/tensor/tensor.h"

#include <algorithm>
#include <cassert>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace quantmill {
namespace {

constexpr size_t kAlignment = 256;  // what the ABI promises for bases handed to plugins

}  // namespace

std::string DeviceName(Device device) {
  return device.is_cpu() ? "cpu" : absl::StrCat("cuda:", device.index);
}

Shape::Shape(std::initializer_list<int64_t> extents)
    : Shape(absl::Span<const int64_t>(extents.begin(), extents.size())) {}

Shape::Shape(absl::Span<const int64_t> extents) : rank_(static_cast<int>(extents.size())) {
  assert(extents.size() <= QM_MAX_RANK);
  std::copy(extents.begin(), extents.end(), extents_.begin());
}

int64_t Shape::elements() const {
  int64_t product = 1;
  for (int64_t extent : extents()) product *= extent;
  return product;
}

std::string Shape::ToString() const {
  return absl::StrCat("[", absl::StrJoin(extents(), ", "), "]");
}

Tensor::Tensor(std::shared_ptr<void> owner, void* data, DType dtype, Shape shape, Device device,
               bool read_only)
    : owner_(std::move(owner)),
      data_(data),
      dtype_(dtype),
      shape_(shape),
      device_(device),
      read_only_(read_only) {}

absl::StatusOr<Tensor> Tensor::Host(DType dtype, Shape shape) {
  const size_t bytes = static_cast<size_t>(shape.elements() * ElementSize(dtype));
  const size_t rounded = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  void* data = std::aligned_alloc(kAlignment, rounded);
  if (data == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot allocate ", bytes, " bytes of host memory for a tensor ",
                     shape.ToString(), "; use fewer or shorter calibration windows"));
  }
  return Tensor(std::shared_ptr<void>(data, std::free), data, dtype, shape, Device{});
}

absl::StatusOr<Tensor> Tensor::HostZeros(DType dtype, Shape shape) {
  absl::StatusOr<Tensor> tensor = Host(dtype, shape);
  if (tensor.ok()) std::memset(tensor->data(), 0, static_cast<size_t>(tensor->bytes()));
  return tensor;
}

Tensor Tensor::FromF32(Shape shape, absl::Span<const float> values) {
  assert(static_cast<int64_t>(values.size()) == shape.elements());
  Tensor tensor = Host(DType::kF32, shape).value();
  std::copy(values.begin(), values.end(), tensor.as<float>());
  return tensor;
}

Tensor Tensor::FromI32(Shape shape, absl::Span<const int32_t> values) {
  assert(static_cast<int64_t>(values.size()) == shape.elements());
  Tensor tensor = Host(DType::kI32, shape).value();
  std::copy(values.begin(), values.end(), tensor.as<int32_t>());
  return tensor;
}

Tensor Tensor::Rows(int64_t begin, int64_t end) const {
  assert(rank() >= 1 && 0 <= begin && begin <= end && end <= dim(0));
  std::array<int64_t, QM_MAX_RANK> extents = {};
  std::copy(shape_.extents().begin(), shape_.extents().end(), extents.begin());
  extents[0] = end - begin;
  const int64_t row_elements = dim(0) == 0 ? 0 : elements() / dim(0);
  Tensor rows = *this;
  rows.data_ = static_cast<char*>(data_) + begin * row_elements * ElementSize(dtype_);
  rows.shape_ = Shape(absl::Span<const int64_t>(extents.data(), static_cast<size_t>(rank())));
  return rows;
}

Tensor Tensor::Reshaped(Shape shape) const {
  assert(shape.elements() == elements());
  Tensor reshaped = *this;
  reshaped.shape_ = shape;
  return reshaped;
}

qm_tensor Tensor::View() const {
  qm_tensor view = {};
  view.data = elements() == 0 ? nullptr : data_;
  view.dtype = static_cast<qm_dtype>(dtype_);
  view.rank = rank();
  view.device = {device_.kind, device_.index};
  int64_t stride = 1;
  for (int axis = QM_MAX_RANK - 1; axis >= 0; --axis) {
    view.shape[axis] = axis < rank() ? shape_[axis] : 1;
    view.stride[axis] = axis < rank() ? stride : 0;
    if (axis < rank()) stride *= shape_[axis];
  }
  view.flags = read_only_ ? QM_TENSOR_READONLY : 0;
  return view;
}

}  // namespace quantmill
