// Matrix products through cuBLAS and cuBLASLt, on row-major matrices, with f32 sums (no tf32).
#ifndef QUANTMILL_CORE_CUDA_MATRIX_PRODUCT_H_
#define QUANTMILL_CORE_CUDA_MATRIX_PRODUCT_H_

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/tensor/dtype.h"

namespace quantmill::cuda {

// out[rows, n] = x[rows, k] weight[n, k]^T. x and weight have the same dtype; out has it too, or
// F32. Rows of out are `out_stride` elements apart; x and weight are contiguous.
struct LinearProduct {
  const void* x;
  const void* weight;
  void* out;
  int64_t rows, n, k, out_stride;
  DType dtype, out_dtype;
};

// c[m, n] = alpha op(a) op(b) + beta c, op(a): [m, k]. Strides are elements between rows as stored.
struct GemmProduct {
  bool trans_a, trans_b;
  int64_t m, n, k;
  float alpha, beta;
  const void* a;
  int64_t a_stride;
  const void* b;
  int64_t b_stride;
  void* c;
  int64_t c_stride;
  DType dtype, c_dtype;
};

class MatrixProducts {
 public:
  static constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;

  // All work goes to `stream`; `workspace` holds kWorkspaceBytes on the device and is kept alive.
  static absl::StatusOr<std::unique_ptr<MatrixProducts>> Create(cudaStream_t stream,
                                                                std::shared_ptr<void> workspace);
  ~MatrixProducts();
  MatrixProducts(const MatrixProducts&) = delete;
  MatrixProducts& operator=(const MatrixProducts&) = delete;

  // The fastest algorithm by cuBLASLt's heuristic is looked up once per shape and kept.
  absl::Status Linear(const LinearProduct& product);
  absl::Status Gemm(const GemmProduct& product);

  cublasHandle_t handle() const { return cublas_; }

 private:
  struct Plan {
    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t weight = nullptr, x = nullptr, out = nullptr;
    cublasLtMatmulAlgo_t algorithm = {};
    bool usable = false;
    ~Plan();
  };
  // rows, n, k, out_stride, dtype, out_dtype, alignment of weight, x, out
  using Key = std::array<int64_t, 9>;

  MatrixProducts(cudaStream_t stream, std::shared_ptr<void> workspace);
  absl::Status Open();
  absl::StatusOr<const Plan*> FindPlan(const LinearProduct& product);
  absl::Status MakePlan(const LinearProduct& product, const Key& key, Plan* plan);

  const cudaStream_t stream_;
  const std::shared_ptr<void> workspace_;
  cublasHandle_t cublas_ = nullptr;
  cublasLtHandle_t lt_ = nullptr;
  std::map<Key, std::unique_ptr<Plan>> plans_;
};

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_CUDA_MATRIX_PRODUCT_H_
