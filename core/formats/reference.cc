#include "core/formats/reference.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/formats/additive_codebook.h"
#include "core/formats/affine_int.h"
#include "core/formats/codebook_absmax.h"
#include "core/formats/float8.h"
#include "core/formats/int8_row.h"

namespace quantmill {
namespace {

constexpr ReferenceFormat kFormats[] = {
    {kAffineIntId, &CheckAffineInt, &DequantizeAffineIntReference},
    {kCodebookAbsmaxId, &CheckCodebookAbsmax, &DequantizeCodebookAbsmaxReference},
    {kInt8RowId, &CheckInt8Row, &DequantizeInt8RowReference},
    {kFloat8Id, &CheckFloat8, &DequantizeFloat8Reference},
    {kAdditiveCodebookId, &CheckAdditiveCodebook, &DequantizeAdditiveCodebookReference},
};

absl::Status NoReference(const PackedWeight& weight) {
  return absl::NotFoundError(
      absl::StrCat("the format ", weight.format_id, " is not built in; load its plugin"));
}

class ReferenceKernel : public PackedKernel {
 public:
  explicit ReferenceKernel(Backend& backend) : backend_(backend) {}

  absl::Status Dequantize(const PackedWeight& weight, Tensor* out) override {
    PackedWeight host = weight;
    for (NamedTensor& named : host.tensors) {
      if (named.tensor.device().is_cpu()) continue;
      QM_ASSIGN_OR_RETURN(Tensor copy, Tensor::Host(named.tensor.dtype(), named.tensor.shape()));
      QM_RETURN_IF_ERROR(backend_.Copy(named.tensor, &copy));
      named.tensor = copy;
    }
    if (out->device().is_cpu()) return DequantizeWithReference(host, out);
    QM_ASSIGN_OR_RETURN(Tensor dense, Tensor::Host(out->dtype(), out->shape()));
    QM_RETURN_IF_ERROR(DequantizeWithReference(host, &dense));
    QM_RETURN_IF_ERROR(backend_.Copy(dense, out));
    return backend_.Synchronize();  // `dense` must outlive the copy
  }

  absl::StatusOr<PackedWeight> Prepack(const PackedWeight& weight) override { return weight; }

  absl::Status MatMul(const PackedWeight&, const Tensor&, Tensor*) override {
    return absl::UnimplementedError("the reference kernel only dequantizes");
  }

 private:
  Backend& backend_;
};

}  // namespace

const ReferenceFormat* FindReferenceFormat(std::string_view format_id) {
  for (const ReferenceFormat& format : kFormats) {
    if (format.id == format_id) return &format;
  }
  return nullptr;
}

absl::Status CheckWithReference(const PackedWeight& weight) {
  const ReferenceFormat* format = FindReferenceFormat(weight.format_id);
  return format == nullptr ? NoReference(weight) : format->check(weight);
}

absl::Status DequantizeWithReference(const PackedWeight& weight, Tensor* out) {
  const ReferenceFormat* format = FindReferenceFormat(weight.format_id);
  return format == nullptr ? NoReference(weight) : format->dequantize(weight, out);
}

std::shared_ptr<PackedKernel> MakeReferencePackedKernel(Backend& backend) {
  return std::make_shared<ReferenceKernel>(backend);
}

}  // namespace quantmill
