/* Services of the host, fetched with call->host_ext(call, id).  Any may be NULL; a plugin then
 * does the work itself or returns QM_FAILED_PRECONDITION saying which service it misses. */
#ifndef QUANTMILL_HOST_EXT_H_
#define QUANTMILL_HOST_EXT_H_

#include "quantmill/plugin.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- threads --------------------------------------------------------------------------------- */
#define QM_HOST_THREADS "qm.host.threads/1"
/* Handles indices [begin, end) on worker `worker` (0 .. worker_count-1). */
typedef qm_status (*qm_range_fn)(void* arg, int64_t begin, int64_t end, int32_t worker) QM_NOEXCEPT;
typedef struct qm_host_threads { /* GROWABLE */
  uint64_t struct_size;
  /* Workers that parallel_for may use, at least 1.  [any] */
  int32_t (*worker_count)(qm_call*) QM_NOEXCEPT;
  /* Runs fn over [0, n) cut into ranges of `grain` (the last may be shorter): the cut does not
   * depend on the number of threads.  Blocks.  Not nestable: QM_FAILED_PRECONDITION inside a body.
   * The first error wins.  [call] */
  qm_status (*parallel_for)(qm_call*, int64_t n, int64_t grain, qm_range_fn fn,
                            void* arg) QM_NOEXCEPT;
} qm_host_threads;

/* ---- linear algebra: so that a plugin need not link cuBLAS or LAPACK ---------------------------
 */
#define QM_HOST_LINALG "qm.host.linalg/1"
typedef struct qm_host_linalg { /* GROWABLE */
  uint64_t struct_size;
  /* c = alpha op(a) op(b) + beta c, rank-2 tensors, row-major, on call->device; f32, or f16/bf16
   * inputs with f32 or equal output.  A row stride may exceed the width.  f32 is computed in full
   * f32 (no tf32).  [call] */
  qm_status (*gemm)(qm_call*, int32_t trans_a, int32_t trans_b, double alpha, const qm_tensor* a,
                    const qm_tensor* b, double beta, qm_tensor* c) QM_NOEXCEPT;
  /* out = upper U with U^T U = (h + damp * mean(diag h) * I)^-1, f32 [n, n], strictly lower part
   * zero: the matrix GPTQ walks over.  h is left alone.  QM_FAILED_PRECONDITION when the damped
   * matrix is not positive definite.  [call] */
  qm_status (*inverse_cholesky)(qm_call*, const qm_tensor* h, double damp,
                                qm_tensor* out) QM_NOEXCEPT;
} qm_host_linalg;

/* ---- CUDA facts ------------------------------------------------------------------------------ */
#define QM_HOST_CUDA "qm.host.cuda/1"
typedef struct qm_host_cuda { /* GROWABLE */
  uint64_t struct_size;
  int32_t runtime_version; /* as cudaRuntimeGetVersion counts */
  int32_t driver_version;  /* as cudaDriverGetVersion counts */
  int32_t cublas_version;  /* as cublasGetVersion counts */
  int32_t sm;              /* 10*major+minor of call->device */
  void* cublas_handle; /* use only if your own cublasGetVersion has the same major; else make one */
} qm_host_cuda;

/* ---- the block a block-scope capability works on -----------------------------------------------
 * Offered while qm_block_transform.run or qm_block_tune.run is open and the pipeline has
 * calibration text.  Inputs are those of the stream that the stage's statistics come from: of the
 * untouched model if all of them are FROM_ORIGINAL; in qm_block_tune.run always of the model packed
 * so far. "Untouched block" means the block as the call found it, with the edits of earlier
 * transforms and with dense weights in every slot.  Values of overrides are f32, f16 or bf16,
 * contiguous, on the host or on call->device; they must stay as they are until the function
 * returns. */
#define QM_HOST_BLOCK "qm.host.block/1"
typedef struct qm_override { /* FROZEN */
  const char* tensor;        /* full name, e.g. "model.layers.3.self_attn.q_proj.weight" */
  qm_tensor value;           /* its content during the call */
} qm_override;
typedef struct qm_host_block { /* GROWABLE */
  uint64_t struct_size;
  /* Calibration windows available. */
  int64_t (*sample_count)(qm_call*) QM_NOEXCEPT;
  /* Runs the block on one window with some tensors replaced for this call only.  out: the host's
   * memory on call->device, [rows, hidden], in the run's compute type; valid until forward is
   * called again.  [call] */
  qm_status (*forward)(qm_call*, int64_t sample, const qm_override*, uint64_t override_count,
                       qm_tensor* out) QM_NOEXCEPT;
  /* Mean squared difference to the untouched block over windows [first, first + count), compared
   * on the output of `submodule`: "self_attn" or "mlp" (between the norm before and the residual
   * after), one linear's name, or "" for the whole block.  What the overrides do not touch is not
   * run again: inputs and outputs of the submodule asked last are kept, up to 256 MiB.  An expert's
   * linear is compared on the rows routed to it; 0 where there are none.  [call] */
  qm_status (*loss)(qm_call*, const char* submodule, int64_t first, int64_t count,
                    const qm_override*, uint64_t override_count, double* out) QM_NOEXCEPT;
  /* Adds to grads[i].tensor the gradient of <d_out, forward(sample, overrides)> with respect to the
   * tensor of the block named grads[i].name (weight or bias of a linear, norm), at its override if
   * it has one.  d_out: [rows, hidden], f32, f16 or bf16, contiguous; grads[i].tensor: f32,
   * contiguous, of the tensor's shape, zeroed by the plugin; both on call->device.  The block is
   * run again for it.  Factors of products are in the run's compute type, sums in f32.  Results do
   * not depend on the number of threads.  QM_UNIMPLEMENTED for a block with a mixture of experts;
   * QM_NOT_FOUND for a tensor the block has not.  NULL in a host without autograd.  [call] */
  qm_status (*vjp)(qm_call*, int64_t sample, const qm_override*, uint64_t override_count,
                   const qm_tensor* d_out, qm_named_tensor* grads, uint64_t grad_count) QM_NOEXCEPT;
} qm_host_block;

#ifdef __cplusplus
}
#endif
#endif /* QUANTMILL_HOST_EXT_H_ */
