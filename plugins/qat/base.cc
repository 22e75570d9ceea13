// Tensors of a packed weight in qm.fmt.affine-int/1 that training starts from.
#include <cstring>
#include <vector>

#include "qat.h"

#if defined(QM_HAVE_CUDA)
#include "quantmill/sdk/cuda.hpp"
#endif

namespace quantmill::qat {
namespace {

const qm_tensor* Find(const qm_packed& packed, const char* name) {
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    if (std::strcmp(packed.tensors[i].name, name) == 0) return &packed.tensors[i].tensor;
  }
  return nullptr;
}

bool IsScaleType(qm_dtype dtype) { return dtype == QM_F16 || dtype == QM_BF16 || dtype == QM_F32; }

// A contiguous matrix on the device of the call, or INVALID_ARGUMENT.
qm_status FindMatrix(qm_call* call, const qm_packed& packed, const char* name, int64_t rows,
                     int64_t cols, const qm_tensor** out) {
  const qm_tensor* tensor = Find(packed, name);
  if (tensor == nullptr) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "the packed weight has no tensor \"", name,
                    "\"; run the stage that packed it again");
  }
  if (tensor->rank != 2 || tensor->shape[0] != rows || tensor->shape[1] != cols) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "\"", name,
                    "\" of the packed weight must have shape [", rows, ", ", cols, "]");
  }
  if (tensor->device.kind != call->device.kind || tensor->device.index != call->device.index) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "\"", name,
                    "\" of the packed weight is not on the device of the call");
  }
  if ((cols > 1 && tensor->stride[1] != 1) || (rows > 1 && tensor->stride[0] != cols)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "\"", name,
                    "\" of the packed weight must be contiguous; pass a copy");
  }
  *out = tensor;
  return QM_OK;
}

qm_status ReadIndex(qm_call* call, const qm_tensor& index, std::vector<int32_t>* out) {
  const size_t bytes = out->size() * sizeof(int32_t);
#if defined(QM_HAVE_CUDA)
  if (index.device.kind == QM_CUDA) {
    QM_CUDA(call, cudaMemcpyAsync(out->data(), index.data, bytes, cudaMemcpyDeviceToHost,
                                  qm::Stream(call)));
    QM_CUDA(call, cudaStreamSynchronize(qm::Stream(call)));
    return QM_OK;
  }
#endif
  if (index.device.kind != QM_CPU) {
    return qm::Fail(call, QM_FAILED_PRECONDITION,
                    "this build of qat has no CUDA kernels; use device cpu");
  }
  std::memcpy(out->data(), index.data, bytes);
  return QM_OK;
}

// A group index is fine where it says what its absence would.
qm_status CheckGroupIndex(qm_call* call, const qm::AffineShape& shape, const qm_tensor& index) {
  if (index.rank != 1 || index.shape[0] != shape.in_features || index.dtype != QM_I32 ||
      (shape.in_features > 1 && index.stride[0] != 1)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "\"group_index\" of the packed weight must be I32 [",
                    shape.in_features, "]");
  }
  std::vector<int32_t> group(static_cast<size_t>(shape.in_features));
  QM_TRY(ReadIndex(call, index, &group));
  for (int64_t i = 0; i < shape.in_features; ++i) {
    if (group[static_cast<size_t>(i)] == i / shape.group_width()) continue;
    return qm::Fail(call, QM_FAILED_PRECONDITION,
                    "groups of the packed weight are not neighbouring input channels (channel ", i,
                    " is in group ", group[static_cast<size_t>(i)],
                    "), as act_order leaves them; give the gptq stage static_groups: true, or "
                    "act_order: false");
  }
  return QM_OK;
}

}  // namespace

qm_status ReadBase(qm_call* call, const qm::AffineShape& shape, const qm_packed& packed,
                   Base* out) {
  const int64_t rows = shape.out_features, groups = shape.groups();
  const qm_tensor *codes = nullptr, *scale = nullptr, *zero = nullptr;
  QM_TRY(FindMatrix(call, packed, "codes", rows,
                    qm::AffineWordsPerRow(shape.in_features, shape.rule.bits), &codes));
  QM_TRY(FindMatrix(call, packed, "scale", rows, groups, &scale));
  if (codes->dtype != QM_I32 || !IsScaleType(scale->dtype)) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "the packed weight must have codes in I32 and ",
                    "scales in F16, BF16 or F32; got dtype codes ", codes->dtype, " and ",
                    scale->dtype);
  }
  *out = {static_cast<const int32_t*>(codes->data), scale->data, nullptr, scale->dtype, QM_U8};
  if (!shape.rule.symmetric) {
    QM_TRY(FindMatrix(call, packed, "zero", rows, groups, &zero));
    if (zero->dtype != QM_U8 && !IsScaleType(zero->dtype)) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "the packed weight must have zero points in U8, ",
                      "F16, BF16 or F32; got dtype code ", zero->dtype);
    }
    out->zero = zero->data;
    out->zero_dtype = zero->dtype;
  }
  const qm_tensor* index = Find(packed, "group_index");
  return index == nullptr ? QM_OK : CheckGroupIndex(call, shape, *index);
}

}  // namespace quantmill::qat
