// Memory, copies and conversions of the CUDA backend, and the lookup of embeddings.
#include <cstring>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/cuda/convert.cuh"
#include "core/cuda/cuda_backend.h"
#include "core/cuda/cuda_status.h"
#include "core/cuda/rows.cuh"

namespace quantmill::cuda {
namespace {

constexpr int64_t kConvertGrain = int64_t{1} << 16;

}  // namespace

absl::StatusOr<Tensor> CudaBackend::Allocate(DType dtype, const Shape& shape) {
  QM_RETURN_IF_ERROR(Enter());
  for (int64_t extent : shape.extents()) {
    if (extent < 0) {
      return Checks("allocate").Invalid(absl::StrCat("negative extent in ", shape.ToString()));
    }
  }
  QM_ASSIGN_OR_RETURN(std::shared_ptr<void> data,
                      memory_->Allocate(shape.elements() * ElementSize(dtype)));
  void* pointer = data.get();
  return Tensor(std::move(data), pointer, dtype, shape, device_);
}

absl::Status CudaBackend::Zero(Tensor* tensor) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("zero");
  QM_RETURN_IF_ERROR(checks.Expect(tensor != nullptr, "tensor is null"));
  QM_RETURN_IF_ERROR(checks.Output("tensor", tensor, tensor->dtype(), tensor->shape()));
  if (tensor->bytes() == 0) return absl::OkStatus();
  QM_CUDA_RETURN(cudaMemsetAsync(tensor->data(), 0, static_cast<size_t>(tensor->bytes()), work()));
  return absl::OkStatus();
}

absl::Status CudaBackend::Copy(const Tensor& source, Tensor* target) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("copy");
  QM_RETURN_IF_ERROR(checks.Expect(target != nullptr, "target is null"));
  QM_RETURN_IF_ERROR(checks.Expect(!target->read_only(), "target is read-only memory"));
  for (const Tensor* tensor : {&source, static_cast<const Tensor*>(target)}) {
    QM_RETURN_IF_ERROR(checks.Expect(tensor->device().is_cpu() || tensor->device() == device_,
                                     "a tensor lies on ", DeviceName(tensor->device()),
                                     ", not on the host or ", DeviceName(device_)));
  }
  QM_RETURN_IF_ERROR(checks.Expect(source.elements() == target->elements(), "shapes ",
                                   source.shape().ToString(), " and ", target->shape().ToString(),
                                   " hold unequal numbers of elements"));
  QM_RETURN_IF_ERROR(
      checks.Expect(source.dtype() == target->dtype() ||
                        (IsModelFloat(source.dtype()) && IsModelFloat(target->dtype())),
                    "cannot convert ", AbslView(DTypeName(source.dtype())), " to ",
                    AbslView(DTypeName(target->dtype()))));
  if (source.elements() == 0) return absl::OkStatus();
  if (source.device().is_cpu()) {
    return target->device().is_cpu() ? CopyOnHost(source, target) : CopyToDevice(source, target);
  }
  return target->device().is_cpu() ? CopyToHost(source, target) : CopyOnDevice(source, target);
}

absl::Status CudaBackend::CopyPieces(const Tensor& source, int64_t pieces, int64_t begin,
                                     Tensor* target) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("copy of pieces");
  QM_RETURN_IF_ERROR(checks.Expect(target != nullptr, "target is null"));
  QM_RETURN_IF_ERROR(checks.Expect(source.device() == device_, "source is not on the device"));
  QM_RETURN_IF_ERROR(checks.Output("target", target, source.dtype(), target->shape()));
  QM_RETURN_IF_ERROR(checks.Expect(PiecesFit(source, pieces, begin, *target), pieces, " pieces of ",
                                   source.shape().ToString(), " do not fit ",
                                   target->shape().ToString(), " from row ", begin, " of each on"));
  if (source.elements() == 0) return absl::OkStatus();
  const size_t bytes = static_cast<size_t>(source.bytes() / pieces);
  const int64_t offset = begin * target->dim(1) * ElementSize(target->dtype());
  QM_CUDA_RETURN(cudaMemcpy2DAsync(
      static_cast<char*>(target->data()) + offset, static_cast<size_t>(target->bytes() / pieces),
      source.data(), bytes, bytes, static_cast<size_t>(pieces), cudaMemcpyDeviceToDevice, work()));
  return absl::OkStatus();
}

absl::Status CudaBackend::CopyOnHost(const Tensor& source, Tensor* target) {
  if (source.dtype() == target->dtype()) {
    std::memmove(target->data(), source.data(), static_cast<size_t>(source.bytes()));
    return absl::OkStatus();
  }
  threads_.ParallelFor(source.elements(), kConvertGrain, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) StoreFloat(*target, i, LoadFloat(source, i));
  });
  return absl::OkStatus();
}

absl::Status CudaBackend::CopyToDevice(const Tensor& source, Tensor* target) {
  if (source.dtype() == target->dtype()) {
    return staging_->ToDevice(source.data(), target->data(), source.bytes());
  }
  QM_ASSIGN_OR_RETURN(const Tensor raw, Upload(source));
  return CopyOnDevice(raw, target);
}

absl::Status CudaBackend::CopyToHost(const Tensor& source, Tensor* target) {
  if (source.dtype() == target->dtype()) {
    return staging_->ToHost(source.data(), target->data(), source.bytes());
  }
  QM_ASSIGN_OR_RETURN(Tensor converted, Allocate(target->dtype(), source.shape()));
  QM_RETURN_IF_ERROR(CopyOnDevice(source, &converted));
  return staging_->ToHost(converted.data(), target->data(), target->bytes());
}

absl::Status CudaBackend::CopyOnDevice(const Tensor& source, Tensor* target) {
  if (source.dtype() == target->dtype()) {
    QM_CUDA_RETURN(cudaMemcpyAsync(target->data(), source.data(),
                                   static_cast<size_t>(source.bytes()), cudaMemcpyDeviceToDevice,
                                   work()));
    return absl::OkStatus();
  }
  QM_CUDA_RETURN(LaunchConvert(source.data(), source.dtype(), target->data(), target->dtype(),
                               source.elements(), work()));
  return absl::OkStatus();
}

absl::StatusOr<Tensor> CudaBackend::Upload(const Tensor& host) {
  QM_ASSIGN_OR_RETURN(Tensor copy, Allocate(host.dtype(), host.shape()));
  QM_RETURN_IF_ERROR(staging_->ToDevice(host.data(), copy.data(), host.bytes()));
  return copy;
}

absl::StatusOr<Tensor> CudaBackend::ToDevice(const Tensor& tensor) {
  QM_RETURN_IF_ERROR(Enter());
  if (tensor.device() == device_) return tensor;
  QM_RETURN_IF_ERROR(
      Checks("to device")
          .Expect(tensor.device().is_cpu(), "tensor lies on ", DeviceName(tensor.device())));
  return Upload(tensor);
}

absl::Status CudaBackend::Synchronize() {
  QM_RETURN_IF_ERROR(Enter());
  QM_CUDA_RETURN(cudaStreamSynchronize(work()));
  return absl::OkStatus();
}

absl::Status CudaBackend::Embed(const Tensor& table, const Tensor& ids, Tensor* out) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("embed");
  QM_RETURN_IF_ERROR(checks.Expect(table.rank() == 2 && IsModelFloat(table.dtype()),
                                   "table must be F32, F16 or BF16 [vocabulary, hidden]"));
  QM_RETURN_IF_ERROR(checks.Expect(ids.rank() == 1, "ids must have one dimension"));
  QM_RETURN_IF_ERROR(checks.HostInput("ids", ids, DType::kI32, ids.shape()));
  QM_RETURN_IF_ERROR(checks.Indices("ids", ids, table.dim(0)));
  QM_RETURN_IF_ERROR(checks.Output("out", out, activation_, {ids.dim(0), table.dim(1)}));
  if (out->elements() == 0) return absl::OkStatus();
  if (table.device().is_cpu()) return EmbedFromHost(table, ids, out);
  QM_RETURN_IF_ERROR(checks.Float("table", table, table.shape()));
  QM_ASSIGN_OR_RETURN(const Tensor index, Upload(ids));
  QM_CUDA_RETURN(LaunchGatherRows(table.data(), table.dtype(), index.as<int32_t>(), ids.dim(0),
                                  table.dim(1), out->data(), activation_, work()));
  return absl::OkStatus();
}

absl::Status CudaBackend::EmbedFromHost(const Tensor& table, const Tensor& ids, Tensor* out) {
  Tensor rows = *out;
  if (table.dtype() != activation_) {
    QM_ASSIGN_OR_RETURN(rows, Allocate(table.dtype(), out->shape()));
  }
  const int64_t row_bytes = table.dim(1) * ElementSize(table.dtype());
  const char* from = table.as<char>();
  const int32_t* id = ids.as<int32_t>();
  QM_RETURN_IF_ERROR(staging_->ToDevice(
      ids.dim(0), row_bytes,
      [&](int64_t first, int64_t count, char* where) {
        for (int64_t i = 0; i < count; ++i) {
          std::memcpy(where + i * row_bytes, from + id[first + i] * row_bytes,
                      static_cast<size_t>(row_bytes));
        }
      },
      rows.data()));
  return table.dtype() == activation_ ? absl::OkStatus() : CopyOnDevice(rows, out);
}

}  // namespace quantmill::cuda
