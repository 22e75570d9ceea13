// Linear layers of the CUDA backend, dense matrix products on views.
#include <algorithm>

#include "core/base/status.h"
#include "core/cuda/convert.cuh"
#include "core/cuda/cuda_backend.h"
#include "core/cuda/cuda_status.h"
#include "core/cuda/elementwise.cuh"
#include "core/cuda/gemv.cuh"

namespace quantmill::cuda {
namespace {

// A weight of another dtype is converted in slices of at most this many bytes, so that the head of
// a large vocabulary does not need a second copy of itself.
constexpr int64_t kConvertedBytes = int64_t{256} << 20;

}  // namespace

absl::Status CudaBackend::Linear(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                 Tensor* out) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("linear");
  QM_RETURN_IF_ERROR(checks.Matrix("x", x));
  QM_RETURN_IF_ERROR(checks.Matrix("weight", weight));
  const int64_t rows = x.dim(0);
  const int64_t k = x.dim(1);
  const int64_t n = weight.dim(0);
  QM_RETURN_IF_ERROR(checks.Float("weight", weight, {n, k}));
  if (!bias.empty()) QM_RETURN_IF_ERROR(checks.Float("bias", bias, {n}));
  QM_RETURN_IF_ERROR(checks.Expect(out != nullptr, "out is null"));
  const DType out_dtype = out->dtype() == DType::kF32 ? DType::kF32 : x.dtype();
  QM_RETURN_IF_ERROR(checks.Output("out", out, out_dtype, {rows, n}));
  if (rows == 0 || n == 0) return absl::OkStatus();

  const GemvArguments gemv = {x.data(),
                              weight.data(),
                              bias.empty() ? nullptr : bias.data(),
                              out->data(),
                              x.dtype(),
                              weight.dtype(),
                              bias.dtype(),
                              out_dtype,
                              rows,
                              n,
                              k};
  if (GemvSuits(gemv)) {
    QM_CUDA_RETURN(LaunchGemv(gemv, work()));
    return absl::OkStatus();
  }
  QM_RETURN_IF_ERROR(DenseProduct(x, weight, out));
  return bias.empty() ? absl::OkStatus() : AddBias(bias, out);
}

absl::Status CudaBackend::DenseProduct(const Tensor& x, const Tensor& weight, Tensor* out) {
  const int64_t n = weight.dim(0);
  const int64_t k = weight.dim(1);
  if (k == 0) return Zero(out);
  LinearProduct product = {x.data(), weight.data(), out->data(), x.dim(0), n, k,
                           n,        x.dtype(),     out->dtype()};
  if (weight.dtype() == x.dtype()) return products_->Linear(product);
  const int64_t slice = std::clamp<int64_t>(kConvertedBytes / (k * ElementSize(x.dtype())), 1, n);
  QM_ASSIGN_OR_RETURN(const Tensor converted, Allocate(x.dtype(), {slice, k}));
  product.weight = converted.data();
  for (int64_t first = 0; first < n; first += slice) {
    const Tensor part = weight.Rows(first, std::min(first + slice, n));
    QM_CUDA_RETURN(LaunchConvert(part.data(), part.dtype(), converted.data(), x.dtype(),
                                 part.elements(), work()));
    product.n = part.dim(0);
    product.out = out->as<char>() + first * ElementSize(out->dtype());
    QM_RETURN_IF_ERROR(products_->Linear(product));
  }
  return absl::OkStatus();
}

absl::Status CudaBackend::AddBias(const Tensor& bias, Tensor* x) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("add bias");
  QM_RETURN_IF_ERROR(checks.Expect(x != nullptr, "x is null"));
  QM_RETURN_IF_ERROR(checks.Matrix("x", *x));
  QM_RETURN_IF_ERROR(checks.Output("x", x, x->dtype(), x->shape()));
  QM_RETURN_IF_ERROR(checks.Float("bias", bias, {x->dim(1)}));
  QM_CUDA_RETURN(LaunchAddBias(bias.data(), bias.dtype(), x->dtype(), x->dim(0), x->dim(1),
                               x->data(), work()));
  return absl::OkStatus();
}

absl::Status CudaBackend::Gemm(bool trans_a, bool trans_b, double alpha, const qm_tensor& a,
                               const qm_tensor& b, double beta, const qm_tensor& c) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("gemm");
  QM_RETURN_IF_ERROR(checks.View("a", a));
  QM_RETURN_IF_ERROR(checks.View("b", b));
  QM_RETURN_IF_ERROR(checks.View("c", c));
  QM_RETURN_IF_ERROR(checks.Expect((c.flags & QM_TENSOR_READONLY) == 0, "c is read-only"));
  QM_RETURN_IF_ERROR(checks.Expect(a.dtype == b.dtype, "a and b have unequal dtypes"));
  QM_RETURN_IF_ERROR(checks.Expect(c.dtype == a.dtype || c.dtype == QM_F32,
                                   "c must be F32 or have the dtype of a"));
  const int64_t m = a.shape[trans_a ? 1 : 0];
  const int64_t k = a.shape[trans_a ? 0 : 1];
  const int64_t n = b.shape[trans_b ? 0 : 1];
  QM_RETURN_IF_ERROR(
      checks.Expect(b.shape[trans_b ? 1 : 0] == k && c.shape[0] == m && c.shape[1] == n,
                    "op(a) is [", m, ", ", k, "], op(b) is [", b.shape[trans_b ? 1 : 0], ", ", n,
                    "] and c is [", c.shape[0], ", ", c.shape[1], "]"));
  return products_->Gemm({trans_a, trans_b, m, n, k, static_cast<float>(alpha),
                          static_cast<float>(beta), a.data, RowStride(a), b.data, RowStride(b),
                          c.data, RowStride(c), static_cast<DType>(a.dtype),
                          static_cast<DType>(c.dtype)});
}

}  // namespace quantmill::cuda
