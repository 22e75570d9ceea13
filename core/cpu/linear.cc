#include "core/cpu/linear.h"

#include <cblas.h>

#include <algorithm>
#include <vector>

#include "core/cpu/convert.h"
#include "core/cpu/linear_few_rows.h"

namespace quantmill::cpu {
namespace {

// Tiles of the product with many rows. Fixed, so that results do not depend on the thread count.
constexpr int64_t kRowTile = 256;
constexpr int64_t kOutTile = 256;
// Columns of the weight converted at a time: 256 x 512 f32 = 512 KiB stays in the L2 cache.
constexpr int64_t kInTile = 512;

struct Problem {
  const float* x;
  int64_t rows, k;
  const void* weight;
  DType weight_dtype;
  int64_t n;
  const float* bias;
  float* out;
};

// Weight rows [first, first + count), columns [from, from + width), as f32 with row stride *stride.
const float* WeightTile(const Problem& p, int64_t first, int64_t count, int64_t from, int64_t width,
                        std::vector<float>& buffer, int64_t* stride) {
  if (p.weight_dtype == DType::kF32) {
    *stride = p.k;
    return static_cast<const float*>(p.weight) + first * p.k + from;
  }
  buffer.resize(static_cast<size_t>(kOutTile * kInTile));
  for (int64_t row = 0; row < count; ++row) {
    ToF32(ElementAddress(p.weight, p.weight_dtype, (first + row) * p.k + from), p.weight_dtype,
          width, buffer.data() + row * width);
  }
  *stride = width;
  return buffer.data();
}

void OutputTile(const Problem& p, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  thread_local std::vector<float> buffer;
  float* out = p.out + row * p.n + column;
  if (p.k == 0) {
    for (int64_t i = 0; i < rows; ++i) std::fill_n(out + i * p.n, columns, 0.0f);
  }
  for (int64_t from = 0; from < p.k; from += kInTile) {
    const int64_t width = std::min(kInTile, p.k - from);
    int64_t stride = 0;
    const float* weight = WeightTile(p, column, columns, from, width, buffer, &stride);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, static_cast<blasint>(rows),
                static_cast<blasint>(columns), static_cast<blasint>(width), 1.0f,
                p.x + row * p.k + from, static_cast<blasint>(p.k), weight,
                static_cast<blasint>(stride), from == 0 ? 0.0f : 1.0f, out,
                static_cast<blasint>(p.n));
  }
  if (p.bias == nullptr) return;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) out[i * p.n + j] += p.bias[column + j];
  }
}

}  // namespace

void Linear(ThreadPool& threads, const float* x, int64_t rows, int64_t k, const void* weight,
            DType weight_dtype, int64_t n, const float* bias, float* out) {
  if (rows >= 1 && rows <= kFewRows) {
    LinearFewRows(threads, x, rows, k, weight, weight_dtype, n, bias, out);
    return;
  }
  const Problem problem = {x, rows, k, weight, weight_dtype, n, bias, out};
  const int64_t row_tiles = (rows + kRowTile - 1) / kRowTile;
  const int64_t out_tiles = (n + kOutTile - 1) / kOutTile;
  threads.ParallelFor(row_tiles * out_tiles, 1, [&](int64_t tile, int64_t, int) {
    const int64_t row = tile % row_tiles * kRowTile;
    const int64_t column = tile / row_tiles * kOutTile;
    OutputTile(problem, row, std::min(kRowTile, rows - row), column,
               std::min(kOutTile, n - column));
  });
}

}  // namespace quantmill::cpu
