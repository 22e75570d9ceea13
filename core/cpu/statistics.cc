#include "core/cpu/statistics.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace quantmill::cpu {
namespace {

// Edge of a tile of the gram matrix. 384 columns make 6 upper tiles, which two threads share
// evenly.
constexpr int64_t kGramTile = 128;
constexpr int64_t kCrossTile = 64;
constexpr int64_t kAbsColumns = 256;

blasint Int(int64_t value) { return static_cast<blasint>(value); }

// c[m, n] += a^T b with a [rows, >= m], b [rows, >= n].
void AddTransposedProduct(int64_t m, int64_t n, int64_t rows, const float* a, int64_t a_stride,
                          const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, Int(m), Int(n), Int(rows), 1.0f, a,
              Int(a_stride), b, Int(b_stride), 1.0f, c, Int(c_stride));
}

}  // namespace

void AccumulateGram(ThreadPool& threads, const float* x, int64_t rows, int64_t k, float* gram) {
  if (rows == 0) return;
  const int64_t tiles = (k + kGramTile - 1) / kGramTile;
  threads.ParallelFor(tiles * tiles, 1, [=](int64_t task, int64_t, int) {
    if (task / tiles > task % tiles) return;
    const int64_t i0 = task / tiles * kGramTile, m = std::min(kGramTile, k - i0);
    const int64_t j0 = task % tiles * kGramTile, n = std::min(kGramTile, k - j0);
    AddTransposedProduct(m, n, rows, x + i0, k, x + j0, k, gram + i0 * k + j0, k);
    for (int64_t i = i0; i < i0 + m; ++i) {
      for (int64_t j = std::max(j0, i + 1); j < j0 + n; ++j) gram[j * k + i] = gram[i * k + j];
    }
  });
}

void AccumulateCross(ThreadPool& threads, const float* original, const float* x, int64_t rows,
                     int64_t k, float* cross) {
  if (rows == 0) return;
  const int64_t tiles = (k + kCrossTile - 1) / kCrossTile;
  threads.ParallelFor(tiles, 1, [=](int64_t tile, int64_t, int) {
    thread_local std::vector<float> difference;
    const int64_t i0 = tile * kCrossTile, m = std::min(kCrossTile, k - i0);
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
