// Products with a narrow factor on the CPU: tiles of the result, each summed over k in order.
#include <algorithm>

#include "oftq.h"
#include "oftq_cpu.h"
#include "quantmill/sdk/plugin.hpp"

namespace quantmill::oftq {
namespace {

constexpr int64_t kTileRows = 16, kTileColumns = 256;

float ElementOf(const Operand& a, int64_t i, int64_t j) {
  float value = 0.0f;
  LoadFloats(a.data, a.dtype, i * a.row_stride + j * a.column_stride, 1, &value);
  return value;
}

// The rows of b as they are, or of its copy in `scratch`.
Operand WithContiguousRows(const Product& p, float* scratch) {
  if (p.b.column_stride == 1) return p.b;
  for (int64_t j = 0; j < p.n; ++j) {
    for (int64_t k = 0; k < p.k; ++k) scratch[k * p.n + j] = ElementOf(p.b, k, j);
  }
  return RowMajor(scratch, QM_F32, p.n);
}

void MultiplyTile(const Product& p, const Operand& b, int64_t row, int64_t column) {
  const int64_t rows = std::min(kTileRows, p.m - row);
  const int64_t columns = std::min(kTileColumns, p.n - column);
  float sum[kTileRows][kTileColumns], b_row[kTileColumns], factors[kTileRows];
  for (int64_t i = 0; i < rows; ++i) std::fill_n(sum[i], columns, 0.0f);
  for (int64_t k = 0; k < p.k; ++k) {
    LoadFloats(b.data, b.dtype, k * b.row_stride + column, columns, b_row);
    for (int64_t i = 0; i < rows; ++i) factors[i] = ElementOf(p.a, row + i, k);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) sum[i][j] += factors[i] * b_row[j];
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (row + i) * p.n + column;
    for (int64_t j = 0; j < columns; ++j) sum[i][j] *= p.scale;
    if (p.accumulate) {
      LoadFloats(p.c, p.c_dtype, at, columns, b_row);
      for (int64_t j = 0; j < columns; ++j) sum[i][j] += b_row[j];
    }
    StoreFloats(sum[i], p.c_dtype, at, columns, p.c);
  }
}

}  // namespace

qm_status MultiplyCpu(qm_call* call, const Product& p, float* scratch) {
  const Operand b = WithContiguousRows(p, scratch);
  const int64_t across = (p.n + kTileColumns - 1) / kTileColumns;
  const int64_t down = (p.m + kTileRows - 1) / kTileRows;
  return qm::ParallelFor(
      call, across * down, 1, [&](int64_t begin, int64_t end, int32_t) -> qm_status {
        for (int64_t tile = begin; tile < end; ++tile) {
          MultiplyTile(p, b, tile / across * kTileRows, tile % across * kTileColumns);
        }
        return QM_OK;
      });
}

}  // namespace quantmill::oftq
