#include "core/cpu/statistics.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/cpu/statistics.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Must come after foreach_target.h.
#include "core/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quantmill::cpu {
namespace HWY_NAMESPACE {

// sum[i] += |x[i]|, maximum[i] = max(maximum[i], |x[i]|); either may be null.
void AbsRow(const float* x, int64_t n, float* sum, float* maximum) {
  const F32 d;
  const int64_t lanes = F32Lanes();
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const VecF32 value = hn::Abs(hn::LoadU(d, x + i));
    if (sum) hn::StoreU(hn::Add(hn::LoadU(d, sum + i), value), d, sum + i);
    if (maximum) hn::StoreU(hn::Max(hn::LoadU(d, maximum + i), value), d, maximum + i);
  }
  for (; i < n; ++i) {
    if (sum) sum[i] += std::fabs(x[i]);
    if (maximum) maximum[i] = std::max(maximum[i], std::fabs(x[i]));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace quantmill::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantmill::cpu {
namespace {

HWY_EXPORT(AbsRow);

// Rows of the result per strip. Small matrices are cut finer: more strips to share among threads,
// and less of the square below the diagonal computed in vain. A function of k alone.
int64_t StripRows(int64_t k) { return k < 1024 ? 64 : 128; }
// Strips of the gram matrix reach from the diagonal to the right in pieces of up to this many
// columns. Square tiles are 10 % slower, as each packs both of its operands again.
constexpr int64_t kGramColumns = 1024;
constexpr int64_t kCacheLine = 64 / sizeof(float);
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

// Copies the part above the diagonal of a block of gram, at most a cache line wide and high, to
// below it. Going block by block uses each line while it is in the cache: rows lie a multiple of 4
// KiB apart for the usual k, so that columns fall into few cache sets.
void MirrorBlock(float* gram, int64_t k, int64_t i0, int64_t m, int64_t j0, int64_t n) {
  for (int64_t j = j0; j < j0 + n; ++j) {
    for (int64_t i = i0; i < std::min(j, i0 + m); ++i) gram[j * k + i] = gram[i * k + j];
  }
}

// A piece of the upper triangle: rows [row, row + StripRows(k)), columns [column, ...).
struct GramPiece {
  int64_t row, column;
};

std::vector<GramPiece> GramPieces(int64_t k) {
  std::vector<GramPiece> pieces;
  for (int64_t row = 0; row < k; row += StripRows(k)) {
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
    const int64_t m = std::min(StripRows(k), k - i0), n = std::min(kGramColumns, k - j0);
    AddTransposedProduct(m, n, rows, x + i0, k, x + j0, k, gram + i0 * k + j0, k);
    for (int64_t i = i0; i < i0 + m; i += kCacheLine) {
      for (int64_t j = std::max(i, j0); j < j0 + n; j += kCacheLine) {
        MirrorBlock(gram, k, i, std::min(kCacheLine, i0 + m - i), j,
                    std::min(kCacheLine, j0 + n - j));
      }
    }
  });
}

void AccumulateCross(ThreadPool& threads, const float* original, const float* x, int64_t rows,
                     int64_t k, float* cross) {
  if (rows == 0) return;
  const int64_t strip = StripRows(k);
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
  const auto kernel = HWY_DYNAMIC_DISPATCH(AbsRow);
  threads.ParallelFor(k, kAbsColumns, [=](int64_t begin, int64_t end, int) {
    for (int64_t row = 0; row < rows; ++row) {
      kernel(x + row * k + begin, end - begin, sum ? sum + begin : nullptr,
             maximum ? maximum + begin : nullptr);
    }
  });
}

}  // namespace quantmill::cpu
#endif  // HWY_ONCE
