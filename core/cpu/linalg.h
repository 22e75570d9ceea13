// Matrix product and the factor GPTQ walks over, on row-major views.
#ifndef QUANTMILL_CORE_CPU_LINALG_H_
#define QUANTMILL_CORE_CPU_LINALG_H_

#include <cstdint>

#include "absl/status/status.h"
#include "core/threads/thread_pool.h"

namespace quantmill::cpu {

// A row-major matrix: element (i, j) is data[i * stride + j].
template <typename T>
struct MatrixView {
  T* data = nullptr;
  int64_t rows = 0, columns = 0, stride = 1;
};

// c = alpha op(a) op(b) + beta c in f32; the inner extents agree. With beta == 0, c is not read.
void Gemm(ThreadPool& threads, bool trans_a, bool trans_b, float alpha, MatrixView<const float> a,
          MatrixView<const float> b, float beta, MatrixView<float> c);

// out = upper U with U^T U = (h + damp * mean(diag h) * I)^-1, strictly lower part zero. Reads the
// upper triangle of h. FAILED_PRECONDITION when the damped matrix is not positive definite (or
// holds NaN), RESOURCE_EXHAUSTED when there is no memory for the work matrix.
//
// The inverse is never formed. With J the reversal of indices and J (h + ...) J = L L^T (Cholesky),
// h + ... = R R^T where R = J L J is upper triangular, hence U = R^-1 = J L^-1 J. One factorisation
// and one triangular inverse, against two factorisations and a full inverse in the reference code
// of GPTQ (https://arxiv.org/abs/2210.17323, section 3.3), and without the error of the inverse.
absl::Status InverseCholesky(ThreadPool& threads, MatrixView<const float> h, double damp,
                             MatrixView<float> out);

}  // namespace quantmill::cpu

#endif  // QUANTMILL_CORE_CPU_LINALG_H_
