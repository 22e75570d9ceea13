// The operations a decoder is made of, on one device. The forward pass (core/model/decoder.h) and
// the statistics (core/calib) are written once over this interface; core/cpu and core/cuda
// implement it. The CPU backend is the reference of the CUDA one.
//
// Conventions. Activations are [rows, features] in the backend's activation dtype: F32 on the CPU;
// F32, F16 or BF16 on CUDA. Sums are accumulated in f32 at least. Weights may have any model float
// dtype, independent of the activations'. Tensor arguments live on device(), outputs are allocated
// by the caller and fully written. Work is stream-ordered on CUDA: calls return before it is done;
// Synchronize() or a copy to the host waits. Methods check shapes and dtypes and return
// INVALID_ARGUMENT; they are called from one thread at a time.
//
// Determinism: results do not depend on the number of threads (fixed tiles, fixed order of sums).
#ifndef QUANTMILL_CORE_TENSOR_BACKEND_H_
#define QUANTMILL_CORE_TENSOR_BACKEND_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/tensor/tensor.h"

namespace quantmill {

class ThreadPool;

// Causal grouped-query attention over `batch` sequences of equal length.
struct AttentionShape {
  int64_t batch = 1;
  int64_t query_length = 0;  // new positions per sequence
  int64_t past_length = 0;   // positions already in keys/values before the first query
  int64_t heads = 0;
  int64_t kv_heads = 0;  // divides heads
  int64_t head_dim = 0;
  int64_t sliding_window = 0;  // position i sees max(0, i - window + 1) .. i; 0 = no limit
  float scale = 0;             // usually head_dim^-0.5
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual Device device() const = 0;
  virtual DType activation_dtype() const = 0;
  // Worker threads for host-side work; never null. On CUDA too (packing, tokenizing, CPU plugins).
  virtual ThreadPool& threads() = 0;
  // cudaStream_t of all work, null on the CPU.
  virtual void* stream() const { return nullptr; }
  // 10 * major + minor of the GPU, 0 on the CPU.
  virtual int sm() const { return 0; }
  // cublasHandle_t, null on the CPU.
  virtual void* cublas_handle() const { return nullptr; }
  // Most device memory in use at once so far, in bytes (0 on the CPU).
  virtual int64_t peak_device_bytes() const { return 0; }

  // ---- memory ----
  virtual absl::StatusOr<Tensor> Allocate(DType dtype, const Shape& shape) = 0;
  virtual absl::Status Zero(Tensor* tensor) = 0;
  // Copies between this device and the host, or within either, converting among F32, F16 and BF16
  // when dtypes differ (round to nearest even). Shapes must hold equally many elements. A copy to
  // host memory is complete on return.
  virtual absl::Status Copy(const Tensor& source, Tensor* target) = 0;
  // source is `pieces` pieces of equally many rows, target as many pieces of rows of the same width
  // and dtype, both on this device: piece p is copied to the rows from `begin` on of target's.
  virtual absl::Status CopyPieces(const Tensor& source, int64_t pieces, int64_t begin,
                                  Tensor* target) = 0;
  // `tensor` itself when it already lives here, else a copy with the same dtype.
  virtual absl::StatusOr<Tensor> ToDevice(const Tensor& tensor) = 0;
  virtual absl::Status Synchronize() = 0;

  // ---- decoder ----
  // out[i, :] = table[ids[i], :]. ids: I32 [rows] on the host, each in [0, vocab). `table` may live
  // on the host (a mapped file): only the rows asked for are touched.
  virtual absl::Status Embed(const Tensor& table, const Tensor& ids, Tensor* out) = 0;
  // out = x / sqrt(mean(x^2) + eps) * weight per row of the last axis; x may be [rows, heads * d]
  // with weight [d]: then every run of d elements is normalised (the q/k norms of Qwen3). In place
  // allowed.
  virtual absl::Status RmsNorm(const Tensor& x, const Tensor& weight, float eps, Tensor* out) = 0;
  // out[rows, n] = x[rows, k] weight[n, k]^T (+ bias[n] when not empty).
  virtual absl::Status Linear(const Tensor& x, const Tensor& weight, const Tensor& bias,
                              Tensor* out) = 0;
  // Adds bias[n] to every row of x.
  virtual absl::Status AddBias(const Tensor& bias, Tensor* x) = 0;
  // Rotates halves in place: x [batch * length, heads * head_dim], row r has position
  // first_position + r % length; cosine, sine: F32 [positions, head_dim / 2] on this device.
  virtual absl::Status Rope(const Tensor& cosine, const Tensor& sine, int64_t first_position,
                            int64_t length, int64_t head_dim, Tensor* x) = 0;
  // q, out: [batch * query_length, heads * head_dim]; keys, values: [batch * capacity, kv_heads *
  // head_dim] with capacity = dim(0) / batch >= past_length + query_length; sequence b's positions
  // start at row b * capacity. Softmax in f32.
  virtual absl::Status Attention(const AttentionShape& shape, const Tensor& q, const Tensor& keys,
                                 const Tensor& values, Tensor* out) = 0;
  // out = silu(gate) * up; in place on either allowed.
  virtual absl::Status SiluMultiply(const Tensor& gate, const Tensor& up, Tensor* out) = 0;
  // target += x.
  virtual absl::Status Add(const Tensor& x, Tensor* target) = 0;

  // ---- mixture of experts ----
  // Softmax over all experts in f32, the top_k largest (lowest index first on ties), optionally
  // divided by their sum. router_logits: [rows, experts]; on the HOST: experts_out I32 [rows,
  // top_k], weights_out F32 [rows, top_k].
  virtual absl::Status RouteTopK(const Tensor& router_logits, int64_t top_k, bool normalize,
                                 Tensor* experts_out, Tensor* weights_out) = 0;
  // out[i, :] = x[rows[i], :]; rows: I32 [n] on the host.
  virtual absl::Status GatherRows(const Tensor& x, const Tensor& rows, Tensor* out) = 0;
  // target[rows[i], :] += weights[i] * x[i, :]; rows I32 [n] distinct, weights F32 [n], both on the
  // host.
  virtual absl::Status ScatterAddRows(const Tensor& x, const Tensor& rows, const Tensor& weights,
                                      Tensor* target) = 0;

  // ---- statistics, all F32 on this device (numerics: plugin_api/STATS.md) ----
  // gram[k, k] += x^T x, both triangles written; full f32 products (no tf32).
  virtual absl::Status AccumulateGram(const Tensor& x, Tensor* gram) = 0;
  // cross[k, k] += (x_original - x)^T x.
  virtual absl::Status AccumulateCross(const Tensor& x_original, const Tensor& x,
                                       Tensor* cross) = 0;
  // sum[k] += sum over rows of |x|; maximum[k] = max(maximum[k], |x|). Either may be null.
  virtual absl::Status AccumulateAbs(const Tensor& x, Tensor* sum, Tensor* maximum) = 0;

  // ---- scoring ----
  // Per row of logits [rows, vocab]: nll[i] = logsumexp(logits[i]) - logits[i, targets[i]], argmax
  // (lowest index on ties). targets I32 [rows] on the host, outputs F32 / I32 [rows] on the host.
  virtual absl::Status ScoreRows(const Tensor& logits, const Tensor& targets, Tensor* nll,
                                 Tensor* argmax) = 0;
  // kl[i] = sum_v p (log p - log q), p = softmax(reference[i]), q = softmax(logits[i]); F32 [rows]
  // on the host.
  virtual absl::Status KlRows(const Tensor& reference, const Tensor& logits, Tensor* kl) = 0;
  // Draws a token per row of logits [rows, vocab] at temperature 1: the first v at which the sum of
  // softmax(logits[i]) up to v exceeds uniforms[i], tokens in `excluded` having no share. On the
  // host: excluded I32 [n], uniforms F64 [rows] in [0, 1), tokens I32 [rows].
  // FAILED_PRECONDITION when the logits of a row are no distribution (NaN, infinite).
  virtual absl::Status DrawRows(const Tensor& logits, const Tensor& excluded,
                                const Tensor& uniforms, Tensor* tokens) = 0;

  // ---- linear algebra for plugins (host_ext.h, qm.host.linalg/1) ----
  // c = alpha op(a) op(b) + beta c over row-major views with row strides; full f32 for F32.
  virtual absl::Status Gemm(bool trans_a, bool trans_b, double alpha, const qm_tensor& a,
                            const qm_tensor& b, double beta, const qm_tensor& c) = 0;
  // Upper U with U^T U = (h + damp * mean(diag h) * I)^-1, strictly lower part zero.
  // FAILED_PRECONDITION when the damped matrix is not positive definite.
  virtual absl::Status InverseCholesky(const qm_tensor& h, double damp, const qm_tensor& out) = 0;

 protected:
  // Do the shapes allow CopyPieces?
  static bool PiecesFit(const Tensor& source, int64_t pieces, int64_t begin, const Tensor& target);
  // What DrawRows says of its tokens, which are -1 for rows that are no distribution.
  static absl::Status AllDrawn(const Tensor& tokens);
};

// threads: 0 = one per core.
absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(int threads = 0);
// UNAVAILABLE when this build has no CUDA or the machine no such GPU. activation: F32, F16, BF16.
absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(int index, DType activation,
                                                         int threads = 0);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TENSOR_BACKEND_H_
