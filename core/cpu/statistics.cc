#include "core/cpu/statistics.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace quantmill::cpu {
namespace {

// The gram matrix is cut in strips of 128 rows, which reach from the diagonal to the right in
// pieces of up to 1024 columns: 384 columns make 3 strips, 1024 make 8. Square tiles of 128 are 10
// % slower, as each packs both of its operands again.
constexpr int64_t kGramRows = 128;
constexpr int64_t kGramColumns = 1024;
// Rows of x per product; longer sums gain nothing once the operands outgrow the cache.
constexpr int64_t kRowChunk = 512;
constexpr int64_t kAbsColumns = 256;

blasint Int(int64_t value) { return static_cast<blasint>(value); }

// c[m, n] += a^T b with a [rows, >= m], b [rows, >= n].
void AddTransposedProduct(int64_t m, int64_t n, int64_t rows, const float* a, int64_t a_stride,
                          const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  for (int64_t row = 0; row < rows; row += kRowChunk) {
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, Int(m), Int(n),
                Int(std::min(kRowChunk, rows - row)), 1.0f, a + row * a_stride, Int(a_stride),
                b + row * b_stride, Int(b_stride), 1.0f, c, Int(c_stride));
  }
}

// A piece of the upper triangle: rows [row, row + kGramRows), columns [column, ...).
struct GramPiece {
  int64_t row, column;
};

std::vector<GramPiece> GramPieces(int64_t k) {
  std::vector<GramPiece> pieces;
  for (int64_t row = 0; row < k; row += kGramRows) {
    for (int64_t column = row; column < k; column += kGramColumns) pieces.push_back({row, column});
  }
  return pieces;
}

}  // namespace

void AccumulateGram(ThreadPool& threads, const float* x, int64_t rows, int64_t k, float* gram) {
  if (rows == 0) return;
  const std::vector<GramPiece> pieces = GramPieces(k);
  threads.ParallelFor(static_cast<int64_t>(pieces.size()), 1, [&](int64_t piece, int64_t, int) {
    const auto [i0, j0] = pieces[static_cast<size_t>(piece)];
    const int64_t m = std::min(kGramRows, k - i0), n = std::min(kGramColumns, k - j0);
    AddTransposedProduct(m, n, rows, x + i0, k, x + j0, k, gram + i0 * k + j0, k);
    for (int64_t j = j0; j < j0 + n; ++j) {
      for (int64_t i = i0; i < std::min(j, i0 + m); ++i) gram[j * k + i] = gram[i * k + j];
    }
  });
}

void AccumulateCross(ThreadPool& threads, const float* original, const float* x, int64_t rows,
                     int64_t k, float* cross) {
  if (rows == 0) return;
  // Enough strips to share small matrices among threads, long ones where there are many anyway.
  const int64_t strip = k < 1024 ? 64 : 128;
  const int64_t tiles = (k + strip - 1) / strip;
  threads.ParallelFor(tiles, 1, [=](int64_t tile, int64_t, int) {
    thread_local std::vector<float> difference;
    const int64_t i0 = tile * strip, m = std::min(strip, k - i0);
    difference.resize(static_cast<size_t>(rows * m));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < m; ++i) {
        difference[row * m + i] = original[row * k + i0 + i] - x[row * k + i0 + i];
      }
    }
    AddTransposedProduct(m, k, rows, difference.data(), m, x, k, cross + i0 * k, k);
  });
}

void AccumulateAbs(ThreadPool& threads, const float* x, int64_t rows, int64_t k, float* sum,
                   float* maximum) {
  threads.ParallelFor(k, kAbsColumns, [=](int64_t begin, int64_t end, int) {
    for (int64_t row = 0; row < rows; ++row) {
      const float* from = x + row * k;
      for (int64_t j = begin; sum != nullptr && j < end; ++j) sum[j] += std::fabs(from[j]);
      for (int64_t j = begin; maximum != nullptr && j < end; ++j) {
        maximum[j] = std::max(maximum[j], std::fabs(from[j]));
      }
    }
  });
}

}  // namespace quantmill::cpu
