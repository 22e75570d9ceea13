// Packed to dense, and y = x W^T for a few rows, on the CPU.
//
// Codebooks of up to 256 vectors: for a row of x, the inner products of each of its groups with
// every vector go into a table of in/d * M * 2^B numbers; an output is then a sum of in/d * M
// entries of it. Longer codebooks: a row of W is decoded and multiplied.
#include <algorithm>
#include <vector>

#include "codebook_format.h"

#if defined(__x86_64__)
#define QM_FLATTEN_AVX2 __attribute__((target("avx2"), flatten))
#endif

namespace quantmill::aqlm {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kTaskRows = 32;

std::vector<float> Widen(const void* values, qm_dtype dtype, int64_t count) {
  std::vector<float> out(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) out[i] = LoadValue(values, dtype, i);
  return out;
}

// One row in f32; codebooks widened.
inline void DecodeRow(const Weight& w, const float* codebooks, int64_t row, float* out) {
  const Params& p = w.params;
  const float scale = LoadValue(w.scales, w.scale_dtype, row);
  for (int64_t j = 0; j < w.groups(); ++j) {
    float* to = out + j * p.group_size;
    std::fill(to, to + p.group_size, 0.0f);
    const int64_t at = (row * w.groups() + j) * p.codebooks;
    for (int32_t m = 0; m < p.codebooks; ++m) {
      const int64_t index =
          static_cast<int64_t>(m) * p.length() + LoadIndex(w.codes, p.index_bits, at + m);
      const float* v = codebooks + index * p.group_size;
      for (int64_t a = 0; a < p.group_size; ++a) to[a] += v[a];
    }
    for (int64_t a = 0; a < p.group_size; ++a) to[a] *= scale;
  }
}

inline float Dot(const float* a, const float* b, int64_t n) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) sums[l] += a[i + l] * b[i + l];
  }
  for (int l = 0; i + l < n; ++l) sums[l] += a[i + l] * b[i + l];
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  }
  return sums[0];
}

struct Product {
  const Weight* weight;
  const float* codebooks;  // widened
  const float* columns;    // [M, d, 2^B]: transposed, for tables
  const float* x;          // [rows, in]
  float* y;                // [rows, out]
  float* table;            // [in / d, M, 2^B] of one row
  int64_t rows;
};

// Table entries of groups [begin, end) for one row of x.
inline void FillTable(const Product& t, const float* x, int64_t begin, int64_t end) {
  const Params& p = t.weight->params;
  const int64_t length = p.length(), d = p.group_size;
  for (int64_t j = begin; j < end; ++j) {
    for (int64_t m = 0; m < p.codebooks; ++m) {
      float* to = t.table + (j * p.codebooks + m) * length;
      std::fill(to, to + length, 0.0f);
      for (int64_t a = 0; a < d; ++a) {
        const float value = x[j * d + a];
        const float* column = t.columns + (m * d + a) * length;
        for (int64_t c = 0; c < length; ++c) to[c] += value * column[c];
      }
    }
  }
}

// Outputs [begin, end) of one row from its table.
inline void SumTable(const Product& t, float* y, int64_t begin, int64_t end) {
  const Weight& w = *t.weight;
  const Params& p = w.params;
  const int64_t codes = w.groups() * p.codebooks;
  const int32_t mask = p.length() - 1;
  for (int64_t o = begin; o < end; ++o) {
    const int8_t* row = static_cast<const int8_t*>(w.codes) + o * codes;
    float sums[4] = {};
    int64_t i = 0;
    for (; i + 4 <= codes; i += 4) {
      for (int l = 0; l < 4; ++l) sums[l] += t.table[(i + l) * p.length() + (row[i + l] & mask)];
    }
    for (; i < codes; ++i) sums[0] += t.table[i * p.length() + (row[i] & mask)];
    y[o] = LoadValue(w.scales, w.scale_dtype, o) * ((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

inline void MultiplyRows(const Product& t, int64_t begin, int64_t end, float* row) {
  const Weight& w = *t.weight;
  for (int64_t o = begin; o < end; ++o) {
    DecodeRow(w, t.codebooks, o, row);
    for (int64_t r = 0; r < t.rows; ++r) t.y[r * w.out + o] = Dot(row, t.x + r * w.in, w.in);
  }
}

#if defined(QM_FLATTEN_AVX2)
QM_FLATTEN_AVX2 void FillTableAvx2(const Product& t, const float* x, int64_t begin, int64_t end) {
  FillTable(t, x, begin, end);
}
QM_FLATTEN_AVX2 void MultiplyRowsAvx2(const Product& t, int64_t begin, int64_t end, float* row) {
  MultiplyRows(t, begin, end, row);
}
bool HaveAvx2() { return __builtin_cpu_supports("avx2") != 0; }
#else
void FillTableAvx2(const Product& t, const float* x, int64_t begin, int64_t end) {
  FillTable(t, x, begin, end);
}
void MultiplyRowsAvx2(const Product& t, int64_t begin, int64_t end, float* row) {
  MultiplyRows(t, begin, end, row);
}
bool HaveAvx2() { return false; }
#endif

qm_status MatmulByTable(qm_call* call, const Product& product) {
  const Weight& w = *product.weight;
  for (int64_t r = 0; r < product.rows; ++r) {
    const float* x = product.x + r * w.in;
    float* y = product.y + r * w.out;
    QM_TRY(qm::ParallelFor(call, w.groups(), 16, [&](int64_t begin, int64_t end, int32_t) {
      HaveAvx2() ? FillTableAvx2(product, x, begin, end) : FillTable(product, x, begin, end);
      return QM_OK;
    }));
    QM_TRY(qm::ParallelFor(call, w.out, kTaskRows, [&](int64_t begin, int64_t end, int32_t) {
      SumTable(product, y, begin, end);
      return QM_OK;
    }));
  }
  return QM_OK;
}

std::vector<float> Transposed(const Params& p, const std::vector<float>& codebooks) {
  std::vector<float> columns(codebooks.size());
  for (int64_t m = 0; m < p.codebooks; ++m) {
    for (int64_t c = 0; c < p.length(); ++c) {
      for (int64_t a = 0; a < p.group_size; ++a) {
        columns[(m * p.group_size + a) * p.length() + c] =
            codebooks[(m * p.length() + c) * p.group_size + a];
      }
    }
  }
  return columns;
}

}  // namespace

qm_status CpuDequantize(qm_call* call, const Weight& w, qm_tensor* out) {
  const std::vector<float> codebooks = Widen(w.codebooks, w.codebook_dtype, w.params.values());
  return qm::ParallelFor(call, w.out, kTaskRows, [&](int64_t begin, int64_t end, int32_t) {
    std::vector<float> row(static_cast<size_t>(w.in));
    for (int64_t o = begin; o < end; ++o) {
      DecodeRow(w, codebooks.data(), o, row.data());
      for (int64_t i = 0; i < w.in; ++i) StoreValue(out->data, out->dtype, o * w.in + i, row[i]);
    }
    return QM_OK;
  });
}

qm_status CpuMatmul(qm_call* call, const Weight& w, const qm_tensor& x, qm_tensor* y) {
  const int64_t rows = x.shape[0];
  if (x.dtype != QM_F32 || rows > kCpuMaxRows) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "on the CPU products with packed weights are served ",
                    "for up to ", kCpuMaxRows, " f32 rows");
  }
  const std::vector<float> codebooks = Widen(w.codebooks, w.codebook_dtype, w.params.values());
  Product product = {&w,
                     codebooks.data(),
                     nullptr,
                     static_cast<const float*>(x.data),
                     static_cast<float*>(y->data),
                     nullptr,
                     rows};
  // A table pays when the outputs that share it are more than its columns.
  if (w.params.index_bits <= 8 && w.out >= w.params.length() / 2) {
    const std::vector<float> columns = Transposed(w.params, codebooks);
    product.columns = columns.data();
    QM_TRY(qm::Scratch(call, kHost, w.groups() * w.params.codebooks * w.params.length(),
                       "a table of products", &product.table));
    return MatmulByTable(call, product);
  }
  return qm::ParallelFor(call, w.out, kTaskRows, [&](int64_t begin, int64_t end, int32_t) {
    std::vector<float> row(static_cast<size_t>(w.in));
    HaveAvx2() ? MultiplyRowsAvx2(product, begin, end, row.data())
               : MultiplyRows(product, begin, end, row.data());
    return QM_OK;
  });
}

}  // namespace quantmill::aqlm
