#include "host/worker/services.h"

#include <atomic>
#include <exception>
#include <mutex>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "core/threads/thread_pool.h"
#include "host/worker/block_service.h"

namespace quantmill {
namespace {

qm_status Fail(qm_call* call, qm_status code, const std::string& text) {
  return call->fail(call, code, text.c_str());
}

qm_status FromStatus(qm_call* call, const absl::Status& status) {
  if (status.ok()) return QM_OK;
  return Fail(call, static_cast<qm_status>(status.code()), std::string(status.message()));
}

// ---- threads ----

int32_t WorkerCount(qm_call* call) noexcept { return ContextOf(call).backend->threads().size(); }

// Calls fn with exceptions contained: a C++ plugin may have been built so that one can leave.
qm_status RunRange(qm_status (*fn)(void*, int64_t, int64_t, int32_t), void* arg, int64_t begin,
                   int64_t end, int worker, std::string* text) {
  try {
    return fn(arg, begin, end, worker);
  } catch (const std::exception& error) {
    *text = absl::StrCat("a parallel_for body threw: ", error.what());
  } catch (...) {
    *text = "a parallel_for body threw something that is no std::exception";
  }
  return QM_INTERNAL;
}

qm_status ParallelFor(qm_call* call, int64_t n, int64_t grain, qm_range_fn fn, void* arg) noexcept {
  if (fn == nullptr || n < 0 || grain <= 0) {
    return Fail(call, QM_INVALID_ARGUMENT,
                absl::StrCat("parallel_for wants a body, n >= 0 and grain > 0; got n ", n,
                             " and grain ", grain));
  }
  if (ThreadPool::InParallelRegion()) {
    return Fail(
        call, QM_FAILED_PRECONDITION,
        "parallel_for inside a parallel_for body; it does not nest, use a plain loop there");
  }
  std::atomic<bool> failed = false;
  std::mutex mutex;
  qm_status first = QM_OK;
  std::string text;
  ContextOf(call).backend->threads().ParallelFor(
      n, grain, [&](int64_t begin, int64_t end, int worker) {
        if (failed.load(std::memory_order_relaxed)) return;
        std::string own_text;
        const qm_status code = RunRange(fn, arg, begin, end, worker, &own_text);
        if (code == QM_OK) return;
        std::lock_guard<std::mutex> lock(mutex);
        if (failed.exchange(true)) return;
        first = code;
        text = std::move(own_text);
      });
  return text.empty() ? first : Fail(call, first, text);
}

constexpr qm_host_threads kThreads = {sizeof(qm_host_threads), WorkerCount, ParallelFor};

// ---- linear algebra ----

qm_status Gemm(qm_call* call, int32_t trans_a, int32_t trans_b, double alpha, const qm_tensor* a,
               const qm_tensor* b, double beta, qm_tensor* c) noexcept {
  if (a == nullptr || b == nullptr || c == nullptr) {
    return Fail(call, QM_INVALID_ARGUMENT, "gemm was given a null tensor");
  }
  const ServiceMark mark(ContextOf(call));
  return FromStatus(
      call, ContextOf(call).backend->Gemm(trans_a != 0, trans_b != 0, alpha, *a, *b, beta, *c));
}

qm_status InverseCholesky(qm_call* call, const qm_tensor* h, double damp, qm_tensor* out) noexcept {
  if (h == nullptr || out == nullptr) {
    return Fail(call, QM_INVALID_ARGUMENT, "inverse_cholesky was given a null tensor");
  }
  const ServiceMark mark(ContextOf(call));
  return FromStatus(call, ContextOf(call).backend->InverseCholesky(*h, damp, *out));
}

constexpr qm_host_linalg kLinalg = {sizeof(qm_host_linalg), Gemm, InverseCholesky};

}  // namespace

const void* HostService(CallContext& context, std::string_view id) {
  if (!context.with_services) return nullptr;
  if (id == QM_HOST_THREADS) return &kThreads;
  if (id == QM_HOST_LINALG) return &kLinalg;
  if (id == QM_HOST_BLOCK) return context.block == nullptr ? nullptr : BlockServiceTable();
  if (id != QM_HOST_CUDA || !context.backend->device().is_cuda()) return nullptr;
  if (context.cuda.struct_size == 0) {
    if (!CudaVersions(&context.cuda)) return nullptr;
    context.cuda.sm = context.backend->sm();
    context.cuda.cublas_handle = context.backend->cublas_handle();
    context.cuda.struct_size = sizeof(context.cuda);
  }
  return &context.cuda;
}

}  // namespace quantmill
