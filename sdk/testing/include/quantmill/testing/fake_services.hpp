// Threads and linear algebra of the fake host: short, plain, slow.
#ifndef QUANTMILL_TESTING_FAKE_SERVICES_HPP_
#define QUANTMILL_TESTING_FAKE_SERVICES_HPP_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#include "quantmill/host_ext.h"
#include "quantmill/plugin.h"
#if defined(QM_HAVE_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace qm::testing {

// Whether the current thread is inside a FakeParallelFor body.
inline bool& InFakeParallelRegion() {
  thread_local bool inside = false;
  return inside;
}

// qm_host_threads::parallel_for on threads of its own.
inline qm_status FakeParallelFor(int threads, int64_t n, int64_t grain, qm_range_fn fn, void* arg,
                                 qm_call* call) noexcept {
  if (InFakeParallelRegion()) {
    return call->fail(call, QM_FAILED_PRECONDITION, "parallel_for inside a parallel_for body");
  }
  if (grain <= 0) return call->fail(call, QM_INVALID_ARGUMENT, "grain must be positive");
  std::atomic<int64_t> next{0};
  std::atomic<qm_status> first_error{QM_OK};
  const auto work = [&](int32_t worker) {
    InFakeParallelRegion() = true;
    for (int64_t begin = next.fetch_add(grain); begin < n && first_error == QM_OK;
         begin = next.fetch_add(grain)) {
      const qm_status status = fn(arg, begin, std::min(n, begin + grain), worker);
      qm_status expected = QM_OK;
      if (status != QM_OK) first_error.compare_exchange_strong(expected, status);
    }
    InFakeParallelRegion() = false;
  };
  std::vector<std::thread> pool;
  for (int32_t worker = 1; worker < threads; ++worker) pool.emplace_back(work, worker);
  work(0);
  for (std::thread& thread : pool) thread.join();
  return first_error;
}

// c[m, n] = alpha op(a) op(b) + beta c, dense row-major; lda and ldb are the widths of a and b as
// stored, k the inner extent.
inline void FakeGemm(bool trans_a, bool trans_b, double alpha, const std::vector<float>& a,
                     int64_t lda, const std::vector<float>& b, int64_t ldb, double beta,
                     std::vector<float>* c, int64_t m, int64_t n, int64_t k) {
  std::vector<double> row(static_cast<size_t>(n));
  for (int64_t i = 0; i < m; ++i) {
    std::fill(row.begin(), row.end(), 0.0);
    for (int64_t p = 0; p < k; ++p) {
      const double x = trans_a ? a[p * lda + i] : a[i * lda + p];
      if (trans_b) {
        for (int64_t j = 0; j < n; ++j) row[j] += x * b[j * ldb + p];
      } else {
        for (int64_t j = 0; j < n; ++j) row[j] += x * b[p * ldb + j];
      }
    }
    float* out = c->data() + i * n;
    for (int64_t j = 0; j < n; ++j) {
      out[j] = static_cast<float>(alpha * row[j] + (beta == 0.0 ? 0.0 : beta * out[j]));
    }
  }
}

// Upper u with u^T u = (h + damp mean(diag h) I)^-1, in f64. Factor the matrix with both axes
// reversed: J M J = L L^T, so M = (J L J)(J L J)^T =: R R^T with R upper, M^-1 = R^-T R^-1 and u is
// R^-1. False when the damped matrix is not positive definite.
inline bool FakeInverseCholesky(const std::vector<float>& h, int64_t n, double damp,
                                std::vector<float>* u) {
  double mean = 0.0;
  for (int64_t i = 0; i < n; ++i) mean += h[i * n + i];
  mean /= static_cast<double>(std::max<int64_t>(n, 1));
  std::vector<double> l(static_cast<size_t>(n * n), 0.0);  // lower factor of the reversed matrix
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      const int64_t ri = n - 1 - i, rj = n - 1 - j;
      double sum = h[ri * n + rj] + (i == j ? damp * mean : 0.0);
      for (int64_t k = 0; k < j; ++k) sum -= l[i * n + k] * l[j * n + k];
      if (i == j) {
        if (!(sum > 0.0) || !std::isfinite(sum)) return false;
        l[i * n + i] = std::sqrt(sum);
      } else {
        l[i * n + j] = sum / l[j * n + j];
      }
    }
  }
  std::vector<double> inverse(static_cast<size_t>(n * n), 0.0);  // of l, lower
  for (int64_t j = 0; j < n; ++j) {
    inverse[j * n + j] = 1.0 / l[j * n + j];
    for (int64_t i = j + 1; i < n; ++i) {
      double sum = 0.0;
      for (int64_t k = j; k < i; ++k) sum -= l[i * n + k] * inverse[k * n + j];
      inverse[i * n + j] = sum / l[i * n + i];
    }
  }
  u->assign(static_cast<size_t>(n * n), 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i; j < n; ++j) {
      (*u)[i * n + j] = static_cast<float>(inverse[(n - 1 - i) * n + (n - 1 - j)]);
    }
  }
  return true;
}

}  // namespace qm::testing

#endif  // QUANTMILL_TESTING_FAKE_SERVICES_HPP_
