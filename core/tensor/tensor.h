// Contiguous tensors that share ownership of their memory: host memory, device memory, or a part of
// a mapped file.
#ifndef QUANTMILL_CORE_TENSOR_TENSOR_H_
#define QUANTMILL_CORE_TENSOR_TENSOR_H_

#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/tensor/dtype.h"
#include "quantmill/plugin.h"

namespace quantmill {

struct Device {
  qm_device_kind kind = QM_CPU;
  int index = 0;
  bool is_cpu() const { return kind == QM_CPU; }
  bool is_cuda() const { return kind == QM_CUDA; }
  friend bool operator==(const Device& a, const Device& b) {
    return a.kind == b.kind && a.index == b.index;
  }
};

// "cpu" or "cuda:0".
std::string DeviceName(Device device);

// At most QM_MAX_RANK extents, held inline.
class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<int64_t> extents);
  explicit Shape(absl::Span<const int64_t> extents);  // extents.size() <= QM_MAX_RANK
  int rank() const { return rank_; }
  int64_t operator[](int axis) const { return extents_[axis]; }
  int64_t elements() const;  // 1 for rank 0
  absl::Span<const int64_t> extents() const {
    return absl::Span<const int64_t>(extents_.data(), rank_);
  }
  std::string ToString() const;  // "[384, 1024]"
  friend bool operator==(const Shape& a, const Shape& b) { return a.extents() == b.extents(); }

 private:
  std::array<int64_t, QM_MAX_RANK> extents_ = {};
  int rank_ = 0;
};

// A row-major contiguous tensor. Copying copies the handle, not the data. A default-constructed
// tensor is empty(). Mutability is by convention: whoever allocated it may write it; tensors over
// mapped files are read-only memory and carry read_only().
class Tensor {
 public:
  Tensor() = default;
  // `owner` keeps `data` alive.
  Tensor(std::shared_ptr<void> owner, void* data, DType dtype, Shape shape, Device device,
         bool read_only = false);

  // Host memory, 256-byte aligned, content undefined. RESOURCE_EXHAUSTED when there is none.
  static absl::StatusOr<Tensor> Host(DType dtype, Shape shape);
  // Host memory set to zero.
  static absl::StatusOr<Tensor> HostZeros(DType dtype, Shape shape);
  // Host copy of values (tests, small constants).
  static Tensor FromF32(Shape shape, absl::Span<const float> values);
  static Tensor FromI32(Shape shape, absl::Span<const int32_t> values);

  bool empty() const { return data_ == nullptr && shape_.rank() == 0; }
  DType dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }
  int64_t dim(int axis) const { return shape_[axis]; }
  int rank() const { return shape_.rank(); }
  int64_t elements() const { return shape_.elements(); }
  int64_t bytes() const { return elements() * ElementSize(dtype_); }
  Device device() const { return device_; }
  bool read_only() const { return read_only_; }

  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

  // Rows [begin, end) of the first axis, sharing memory.
  Tensor Rows(int64_t begin, int64_t end) const;
  // The same elements under another shape with as many elements.
  Tensor Reshaped(Shape shape) const;

  // A view for the C ABI; valid while this tensor's memory lives.
  qm_tensor View() const;

 private:
  std::shared_ptr<void> owner_;
  void* data_ = nullptr;
  DType dtype_ = DType::kF32;
  Shape shape_;
  Device device_;
  bool read_only_ = false;
};

// Element `index` of a tensor of F32, F16 or BF16 on the host.
inline float LoadFloat(const Tensor& tensor, int64_t index) {
  switch (tensor.dtype()) {
    case DType::kF16:
      return F16ToF32(tensor.as<uint16_t>()[index]);
    case DType::kBF16:
      return BF16ToF32(tensor.as<uint16_t>()[index]);
    default:
      return tensor.as<float>()[index];
  }
}

inline void StoreFloat(const Tensor& tensor, int64_t index, float value) {
  switch (tensor.dtype()) {
    case DType::kF16:
      tensor.as<uint16_t>()[index] = F32ToF16(value);
      break;
    case DType::kBF16:
      tensor.as<uint16_t>()[index] = F32ToBF16(value);
      break;
    default:
      tensor.as<float>()[index] = value;
  }
}

struct NamedTensor {
  std::string name;
  Tensor tensor;
};

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TENSOR_TENSOR_H_
