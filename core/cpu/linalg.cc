#include "core/cpu/linalg.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"

namespace quantmill::cpu {
namespace {

constexpr int64_t kGemmTile = 256;
// Edge of a block of the factorisation: large enough for the products to run at full speed, small
// enough that the unblocked factorisation of one block stays a small part of the work.
constexpr int64_t kBlock = 128;
// Up to here the factorisation is done in f64: it costs under a second on two cores and 128 MiB.
// Beyond, time and memory count and damping bounds the condition number.
constexpr int64_t kLargestF64 = 4096;

blasint Int(int64_t value) { return static_cast<blasint>(value); }

CBLAS_TRANSPOSE Op(bool transposed) { return transposed ? CblasTrans : CblasNoTrans; }

// c[m, n] = alpha a[m, k] op(b) + beta c.
void Product(bool trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
             int64_t a_stride, const float* b, int64_t b_stride, float beta, float* c,
             int64_t c_stride) {
  cblas_sgemm(CblasRowMajor, CblasNoTrans, Op(trans_b), Int(m), Int(n), Int(k), alpha, a,
              Int(a_stride), b, Int(b_stride), beta, c, Int(c_stride));
}
void Product(bool trans_b, int64_t m, int64_t n, int64_t k, double alpha, const double* a,
             int64_t a_stride, const double* b, int64_t b_stride, double beta, double* c,
             int64_t c_stride) {
  cblas_dgemm(CblasRowMajor, CblasNoTrans, Op(trans_b), Int(m), Int(n), Int(k), alpha, a,
              Int(a_stride), b, Int(b_stride), beta, c, Int(c_stride));
}

// b[m, n] = b l^-T with l[n, n] lower triangular.
void SolveRight(int64_t m, int64_t n, const float* l, float* b, int64_t stride) {
  cblas_strsm(CblasRowMajor, CblasRight, CblasLower, CblasTrans, CblasNonUnit, Int(m), Int(n), 1.0f,
              l, Int(stride), b, Int(stride));
}
void SolveRight(int64_t m, int64_t n, const double* l, double* b, int64_t stride) {
  cblas_dtrsm(CblasRowMajor, CblasRight, CblasLower, CblasTrans, CblasNonUnit, Int(m), Int(n), 1.0,
              l, Int(stride), b, Int(stride));
}

// A square matrix cut in blocks of kBlock.
template <typename T>
struct Blocked {
  T* data;
  int64_t n;
  int64_t blocks() const { return (n + kBlock - 1) / kBlock; }
  int64_t size(int64_t block) const { return std::min(kBlock, n - block * kBlock); }
  T* at(int64_t i, int64_t j) const { return data + i * kBlock * n + j * kBlock; }
};

// Lower Cholesky factor of a small matrix in place, strictly upper part zero; the row of the first
// pivot that is not positive, or -1.
template <typename T>
int64_t FactorBlock(T* a, int64_t size, int64_t stride) {
  T column[kBlock];  // of the factor; contiguous, so that the update below runs along rows
  for (int64_t j = 0; j < size; ++j) {
    const T pivot = a[j * stride + j];
    if (!(pivot > 0) || !std::isfinite(pivot)) return j;
    const T diagonal = std::sqrt(pivot);
    a[j * stride + j] = diagonal;
    std::fill(a + j * stride + j + 1, a + j * stride + size, T(0));
    for (int64_t i = j + 1; i < size; ++i) {
      T* row = a + i * stride;
      const T factor = row[j] / diagonal;
      row[j] = column[i] = factor;
      for (int64_t k = j + 1; k <= i; ++k) row[k] -= factor * column[k];
    }
  }
  return -1;
}

// Inverse of a small lower triangular matrix in place.
template <typename T>
void InvertBlock(T* l, int64_t size, int64_t stride) {
  for (int64_t i = 0; i < size; ++i) {
    T* row = l + i * stride;
    const T diagonal = T(1) / row[i];
    // Row i of the inverse is -diagonal * (row i of l) * (rows above of the inverse).
    T result[kBlock] = {};
    for (int64_t k = 0; k < i; ++k) {
      const T factor = row[k];
      const T* above = l + k * stride;
      for (int64_t j = 0; j <= k; ++j) result[j] += factor * above[j];
    }
    for (int64_t j = 0; j < i; ++j) row[j] = -diagonal * result[j];
    row[i] = diagonal;
  }
}

// Right-looking blocked Cholesky, lower triangle in place. Returns the row of the failing pivot or
// -1.
template <typename T>
int64_t Factor(ThreadPool& threads, const Blocked<T>& a) {
  for (int64_t k = 0; k < a.blocks(); ++k) {
    const int64_t failed = FactorBlock(a.at(k, k), a.size(k), a.n);
    if (failed >= 0) return k * kBlock + failed;
    const int64_t below = a.blocks() - k - 1;
    threads.ParallelFor(below, 1, [&](int64_t i, int64_t, int) {
      SolveRight(a.size(k + 1 + i), a.size(k), a.at(k, k), a.at(k + 1 + i, k), a.n);
    });
    threads.ParallelFor(below * below, 1, [&](int64_t task, int64_t, int) {
      const int64_t i = k + 1 + task / below, j = k + 1 + task % below;
      if (j > i) return;
      Product(true, a.size(i), a.size(j), a.size(k), T(-1), a.at(i, k), a.n, a.at(j, k), a.n, T(1),
              a.at(i, j), a.n);
    });
  }
  return -1;
}

// Inverse of a lower triangular matrix in place, one row of blocks after the other:
// X_ij = -X_ii sum_{j <= k < i} L_ik X_kj. row: room for kBlock * n elements, where row i of L is
// kept while X_i* overwrites it.
template <typename T>
void InvertTriangle(ThreadPool& threads, const Blocked<T>& l, T* row) {
  for (int64_t i = 0; i < l.blocks(); ++i) {
    const int64_t size = l.size(i), width = i * kBlock;
    for (int64_t r = 0; r < size; ++r) {
      std::copy_n(l.at(i, 0) + r * l.n, width, row + r * width);
    }
    InvertBlock(l.at(i, i), size, l.n);
    threads.ParallelFor(i, 1, [&](int64_t j, int64_t, int) {
      T product[kBlock * kBlock];
      const int64_t columns = l.size(j), from = j * kBlock;
      Product(false, size, columns, width - from, T(1), row + from, width, l.at(j, j), l.n, T(0),
              product, columns);
      Product(false, size, columns, size, T(-1), l.at(i, i), l.n, product, columns, T(0),
              l.at(i, j), l.n);
    });
  }
}

// Work matrix = J (h + shift I) J, lower triangle; strictly upper part zero.
template <typename T>
void CopyReversed(ThreadPool& threads, MatrixView<const float> h, T shift, T* work) {
  const int64_t n = h.rows;
  threads.ParallelFor(n, 64, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const float* from = h.data + (n - 1 - i) * h.stride;
      T* to = work + i * n;
      for (int64_t j = 0; j <= i; ++j) to[j] = static_cast<T>(from[n - 1 - j]);
      to[i] += shift;
      std::fill(to + i + 1, to + n, T(0));
    }
  });
}

// out = J work J, work lower triangular.
template <typename T>
void CopyBackReversed(ThreadPool& threads, const T* work, MatrixView<float> out) {
  const int64_t n = out.rows;
  threads.ParallelFor(n, 64, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const T* from = work + (n - 1 - i) * n;
      float* to = out.data + i * out.stride;
      std::fill(to, to + i, 0.0f);
      for (int64_t j = i; j < n; ++j) to[j] = static_cast<float>(from[n - 1 - j]);
    }
  });
}

template <typename T>
absl::Status InverseCholeskyIn(ThreadPool& threads, MatrixView<const float> h, double shift,
                               MatrixView<float> out) {
  const int64_t n = h.rows;
  const int64_t elements = n * n + kBlock * n;
  const std::unique_ptr<T[]> work(new (std::nothrow) T[static_cast<size_t>(elements)]);
  if (work == nullptr) {
    return absl::ResourceExhaustedError(
        ErrorText(absl::StrCat("no memory to factor a matrix of ", n, " x ", n),
                  absl::StrCat(elements * static_cast<int64_t>(sizeof(T)), " bytes are needed")));
  }
  CopyReversed(threads, h, static_cast<T>(shift), work.get());
  const Blocked<T> blocked = {work.get(), n};
  const int64_t failed = Factor(threads, blocked);
  if (failed >= 0) {
    return absl::FailedPreconditionError(ErrorText(
        "the damped matrix is not positive definite",
        absl::StrCat("pivot ", n - 1 - failed, " of ", n, " is not a positive finite number"),
        "use more damping or more calibration samples, and check the inputs for NaN"));
  }
  InvertTriangle(threads, blocked, work.get() + n * n);
  CopyBackReversed(threads, work.get(), out);
  return absl::OkStatus();
}

}  // namespace

void Gemm(ThreadPool& threads, bool trans_a, bool trans_b, float alpha, MatrixView<const float> a,
          MatrixView<const float> b, float beta, MatrixView<float> c) {
  const int64_t inner = trans_a ? a.rows : a.columns;
  const int64_t row_tiles = (c.rows + kGemmTile - 1) / kGemmTile;
  const int64_t column_tiles = (c.columns + kGemmTile - 1) / kGemmTile;
  threads.ParallelFor(row_tiles * column_tiles, 1, [&](int64_t tile, int64_t, int) {
    const int64_t i = tile / column_tiles * kGemmTile, j = tile % column_tiles * kGemmTile;
    cblas_sgemm(CblasRowMajor, Op(trans_a), Op(trans_b), Int(std::min(kGemmTile, c.rows - i)),
                Int(std::min(kGemmTile, c.columns - j)), Int(inner), alpha,
                a.data + (trans_a ? i : i * a.stride), Int(a.stride),
                b.data + (trans_b ? j * b.stride : j), Int(b.stride), beta,
                c.data + i * c.stride + j, Int(c.stride));
  });
}

absl::Status InverseCholesky(ThreadPool& threads, MatrixView<const float> h, double damp,
                             MatrixView<float> out) {
  const int64_t n = h.rows;
  if (n == 0) return absl::OkStatus();
  double trace = 0;
  for (int64_t i = 0; i < n; ++i) trace += h.data[i * h.stride + i];
  const double shift = damp * trace / static_cast<double>(n);
  if (n <= kLargestF64) return InverseCholeskyIn<double>(threads, h, shift, out);
  return InverseCholeskyIn<float>(threads, h, shift, out);
}

}  // namespace quantmill::cpu
