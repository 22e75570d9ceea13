// Calibration statistics of the CUDA backend (numerics: plugin_api/STATS.md).
#include <algorithm>

#include "core/base/status.h"
#include "core/cuda/convert.cuh"
#include "core/cuda/cuda_backend.h"
#include "core/cuda/cuda_status.h"
#include "core/cuda/statistics.cuh"

namespace quantmill::cuda {
namespace {

// Rows of the Gram matrix per product. Only panels up to the diagonal are computed, so the work is
// (1 + 1/panels) / 2 of the full product; smaller panels would leave the GPU idle.
constexpr int64_t kPanel = 2048;

}  // namespace

// out[i, j] += sum_r a[r, i] b[r, j]; a, b: [rows, width].
absl::Status CudaBackend::AddTransposedProduct(const void* a, const void* b, DType dtype,
                                               int64_t rows, int64_t width, Tensor* out) {
  return products_->Gemm({true, false, width, width, rows, 1.0f, 1.0f, a, width, b, width,
                          out->data(), width, dtype, DType::kF32});
}

// Products of two 16-bit numbers are exact in f32, so the tensor cores form them as STATS.md asks;
// F32 rows go through full f32 arithmetic.
absl::Status CudaBackend::AccumulateGram(const Tensor& x, Tensor* gram) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("gram");
  QM_RETURN_IF_ERROR(checks.Matrix("x", x));
  const int64_t rows = x.dim(0);
  const int64_t k = x.dim(1);
  QM_RETURN_IF_ERROR(checks.Output("gram", gram, DType::kF32, {k, k}));
  if (rows == 0) return absl::OkStatus();
  for (int64_t first = 0; first < k; first += kPanel) {
    const int64_t height = std::min(kPanel, k - first);
    const char* columns = x.as<char>() + first * ElementSize(x.dtype());
    // gram[first : first + height, 0 : first + height]
    QM_RETURN_IF_ERROR(
        products_->Gemm({true, false, height, first + height, rows, 1.0f, 1.0f, columns, k,
                         x.data(), k, gram->as<float>() + first * k, k, x.dtype(), DType::kF32}));
  }
  QM_CUDA_RETURN(LaunchMirrorLower(gram->as<float>(), k, work()));
  return absl::OkStatus();
}

absl::Status CudaBackend::AccumulateCross(const Tensor& x_original, const Tensor& x,
                                          Tensor* cross) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("cross");
  QM_RETURN_IF_ERROR(checks.Matrix("x", x));
  QM_RETURN_IF_ERROR(checks.Input("x_original", x_original, x.dtype(), x.shape()));
  QM_RETURN_IF_ERROR(checks.Output("cross", cross, DType::kF32, {x.dim(1), x.dim(1)}));
  if (x.elements() == 0) return absl::OkStatus();
  return x.dtype() == DType::kBF16 ? CrossInPieces(x_original, x, cross)
                                   : CrossInF32(x_original, x, cross);
}

// The difference needs 24 bits: as three BF16 pieces it goes through the tensor cores with exact
// products, several times faster than f32 arithmetic.
absl::Status CudaBackend::CrossInPieces(const Tensor& x_original, const Tensor& x, Tensor* cross) {
  const int64_t count = x.elements();
  QM_ASSIGN_OR_RETURN(const Tensor pieces, Allocate(DType::kBF16, {3, count}));
  uint16_t* piece = pieces.as<uint16_t>();
  QM_CUDA_RETURN(LaunchDifferencePieces(x_original.data(), x.data(), piece, piece + count,
                                        piece + 2 * count, count, work()));
  for (int64_t i = 0; i < 3; ++i) {
    QM_RETURN_IF_ERROR(
        AddTransposedProduct(piece + i * count, x.data(), DType::kBF16, x.dim(0), x.dim(1), cross));
  }
  return absl::OkStatus();
}

absl::Status CudaBackend::CrossInF32(const Tensor& x_original, const Tensor& x, Tensor* cross) {
  QM_ASSIGN_OR_RETURN(const Tensor difference, Allocate(DType::kF32, x.shape()));
  QM_CUDA_RETURN(LaunchDifference(x_original.data(), x.data(), x.dtype(), difference.as<float>(),
                                  x.elements(), work()));
  Tensor rows = x;
  if (x.dtype() != DType::kF32) {
    QM_ASSIGN_OR_RETURN(rows, Allocate(DType::kF32, x.shape()));
    QM_RETURN_IF_ERROR(CopyOnDevice(x, &rows));
  }
  return AddTransposedProduct(difference.data(), rows.data(), DType::kF32, x.dim(0), x.dim(1),
                              cross);
}

absl::Status CudaBackend::AccumulateAbs(const Tensor& x, Tensor* sum, Tensor* maximum) {
  QM_RETURN_IF_ERROR(Enter());
  const Checker checks = Checks("abs");
  QM_RETURN_IF_ERROR(checks.Matrix("x", x));
  const Shape shape = {x.dim(1)};
  if (sum != nullptr) QM_RETURN_IF_ERROR(checks.Output("sum", sum, DType::kF32, shape));
  if (maximum != nullptr) QM_RETURN_IF_ERROR(checks.Output("maximum", maximum, DType::kF32, shape));
  if (x.elements() == 0) return absl::OkStatus();
  QM_ASSIGN_OR_RETURN(const Tensor scratch,
                      Allocate(DType::kF32, {AbsScratch(x.dim(0), x.dim(1))}));
  QM_CUDA_RETURN(LaunchAbs(x.data(), x.dtype(), x.dim(0), x.dim(1), scratch.as<float>(),
                           sum == nullptr ? nullptr : sum->as<float>(),
                           maximum == nullptr ? nullptr : maximum->as<float>(), work()));
  return absl::OkStatus();
}

}  // namespace quantmill::cuda
