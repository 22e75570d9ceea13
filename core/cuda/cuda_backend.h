// The CUDA implementation of core/tensor/backend.h. Checks and dispatch are here
// (backend_*.cc), kernels in the .cu files beside.
#ifndef QUANTMILL_CORE_CUDA_CUDA_BACKEND_H_
#define QUANTMILL_CORE_CUDA_CUDA_BACKEND_H_

#include <cusolverDn.h>

#include <cstdint>
#include <memory>

#include "absl/strings/string_view.h"
#include "core/cuda/checks.h"
#include "core/cuda/device_memory.h"
#include "core/cuda/matrix_product.h"
#include "core/cuda/staging.h"
#include "core/tensor/backend.h"
#include "core/threads/thread_pool.h"

namespace quantmill::cuda {

class CudaBackend final : public Backend {
 public:
  static absl::StatusOr<std::unique_ptr<CudaBackend>> Create(int index, DType activation,
                                                             int threads);
  ~CudaBackend() override;

  Device device() const override { return device_; }
  DType activation_dtype() const override { return activation_; }
  ThreadPool& threads() override { return threads_; }
  void* stream() const override { return memory_->stream(); }
  int sm() const override { return sm_; }
  void* cublas_handle() const override { return products_->handle(); }
  int64_t peak_device_bytes() const override { return memory_->peak_bytes(); }

  absl::StatusOr<Tensor> Allocate(DType dtype, const Shape& shape) override;
  absl::Status Zero(Tensor* tensor) override;
  absl::Status Copy(const Tensor& source, Tensor* target) override;
  absl::Status CopyPieces(const Tensor& source, int64_t pieces, int64_t begin,
                          Tensor* target) override;
  absl::StatusOr<Tensor> ToDevice(const Tensor& tensor) override;
  absl::Status Synchronize() override;

  absl::Status Embed(const Tensor& table, const Tensor& ids, Tensor* out) override;
  absl::Status RmsNorm(const Tensor& x, const Tensor& weight, float eps, Tensor* out) override;
  absl::Status Linear(const Tensor& x, const Tensor& weight, const Tensor& bias,
                      Tensor* out) override;
  absl::Status AddBias(const Tensor& bias, Tensor* x) override;
  absl::Status Rope(const Tensor& cosine, const Tensor& sine, int64_t first_position,
                    int64_t length, int64_t head_dim, Tensor* x) override;
  absl::Status Attention(const AttentionShape& shape, const Tensor& q, const Tensor& keys,
                         const Tensor& values, Tensor* out) override;
  absl::Status SiluMultiply(const Tensor& gate, const Tensor& up, Tensor* out) override;
  absl::Status Add(const Tensor& x, Tensor* target) override;

  absl::Status RouteTopK(const Tensor& router_logits, int64_t top_k, bool normalize,
                         Tensor* experts_out, Tensor* weights_out) override;
  absl::Status GatherRows(const Tensor& x, const Tensor& rows, Tensor* out) override;
  absl::Status ScatterAddRows(const Tensor& x, const Tensor& rows, const Tensor& weights,
                              Tensor* target) override;

  absl::Status AccumulateGram(const Tensor& x, Tensor* gram) override;
  absl::Status AccumulateCross(const Tensor& x_original, const Tensor& x, Tensor* cross) override;
  absl::Status AccumulateAbs(const Tensor& x, Tensor* sum, Tensor* maximum) override;

  absl::Status ScoreRows(const Tensor& logits, const Tensor& targets, Tensor* nll,
                         Tensor* argmax) override;
  absl::Status KlRows(const Tensor& reference, const Tensor& logits, Tensor* kl) override;
  absl::Status DrawRows(const Tensor& logits, const Tensor& excluded, const Tensor& uniforms,
                        Tensor* tokens) override;

  absl::Status Gemm(bool trans_a, bool trans_b, double alpha, const qm_tensor& a,
                    const qm_tensor& b, double beta, const qm_tensor& c) override;
  absl::Status InverseCholesky(const qm_tensor& h, double damp, const qm_tensor& out) override;

 private:
  CudaBackend(int index, DType activation, int threads);
  absl::Status Open();

  cudaStream_t work() const { return memory_->stream(); }
  Checker Checks(absl::string_view op) const { return Checker(op, device_); }
  // Makes the device current on the calling thread; every operation starts with it.
  absl::Status Enter() const;
  // A copy of a host tensor on the device.
  absl::StatusOr<Tensor> Upload(const Tensor& host);

  // ---- backend_memory.cc ----
  absl::Status CopyToDevice(const Tensor& source, Tensor* target);
  absl::Status CopyToHost(const Tensor& source, Tensor* target);
  absl::Status CopyOnDevice(const Tensor& source, Tensor* target);
  absl::Status CopyOnHost(const Tensor& source, Tensor* target);
  absl::Status EmbedFromHost(const Tensor& table, const Tensor& ids, Tensor* out);

  // ---- backend_linear.cc ----
  absl::Status DenseProduct(const Tensor& x, const Tensor& weight, Tensor* out);

  // ---- backend_statistics.cc ----
  absl::Status CrossInPieces(const Tensor& x_original, const Tensor& x, Tensor* cross);
  absl::Status CrossInF32(const Tensor& x_original, const Tensor& x, Tensor* cross);
  absl::Status AddTransposedProduct(const void* a, const void* b, DType dtype, int64_t rows,
                                    int64_t width, Tensor* out);

  // ---- backend_linalg.cc ----
  absl::Status FactorAndInvert(int64_t n, float* matrix, int* info);
  absl::Status OpenSolver();

  const Device device_;
  const DType activation_;
  ThreadPool threads_;
  int sm_ = 0;
  std::shared_ptr<DeviceMemory> memory_;
  std::unique_ptr<Staging> staging_;
  std::unique_ptr<MatrixProducts> products_;
  cusolverDnHandle_t solver_ = nullptr;  // made at first use: it takes its own device memory
  cusolverDnParams_t solver_params_ = nullptr;
};

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_CUDA_CUDA_BACKEND_H_
