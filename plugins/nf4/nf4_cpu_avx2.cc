// Fused dequantize-and-multiply with AVX2: 8 bytes of codes at a time. See nf4_cpu_avx512.cc.
#if defined(__x86_64__)

#include <immintrin.h>

#include "nf4.h"

#define QM_AVX2 __attribute__((target("avx2,fma")))

namespace quantmill::nf4 {
namespace {

constexpr int64_t kChunk = 16;  // weights

QM_AVX2 inline float HorizontalSum(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// The 16 values of a block, in two registers.
struct Table {
  __m256 low, high;
};

// vpermps reads three bits of its index; the fourth, moved to the sign, chooses the register.
QM_AVX2 inline __m256 LookUp(const Table& table, __m256i code, __m256i fourth_as_sign) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, code),
                          _mm256_permutevar8x32_ps(table.high, code),
                          _mm256_castsi256_ps(fourth_as_sign));
}

// One row of codes times M rows of x.
template <int M>
QM_AVX2 void OneRow(const FusedInput& in, int64_t row, float* y, int64_t ldy) {
  const Weight& w = *in.weight;
  const Table codebook = {_mm256_loadu_ps(w.codebook), _mm256_loadu_ps(w.codebook + 8)};
  __m256 even[M], odd[M];
  for (int r = 0; r < M; ++r) even[r] = odd[r] = _mm256_setzero_ps();
  const int64_t first = row * w.in, size = w.params.block_size;
  int64_t block_end = 0;  // of the block whose values are in the table, from the row's start
  Table table = codebook;
  for (int64_t k = 0; k < w.in; k += kChunk) {
    if (k >= block_end) {
      const int64_t block = (first + k) / size;
      const __m256 absmax = _mm256_set1_ps(w.AbsmaxOf(block));
      table = {_mm256_mul_ps(codebook.low, absmax), _mm256_mul_ps(codebook.high, absmax)};
      block_end = (block + 1) * size - first;
    }
    const void* bytes = w.codes + (first + k) / 2;
    const __m256i packed =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(bytes)));
    const __m256 high = LookUp(table, _mm256_srli_epi32(packed, 4), _mm256_slli_epi32(packed, 24));
    const __m256 low = LookUp(table, packed, _mm256_slli_epi32(packed, 28));
    for (int r = 0; r < M; ++r) {
      const float* x = in.x + r * in.row_stride + k;
      even[r] = _mm256_fmadd_ps(high, _mm256_loadu_ps(x), even[r]);
      odd[r] = _mm256_fmadd_ps(low, _mm256_loadu_ps(x + 8), odd[r]);
    }
  }
  for (int r = 0; r < M; ++r) y[r * ldy + row] = HorizontalSum(_mm256_add_ps(even[r], odd[r]));
}

}  // namespace

void FusedRowsAvx2(const FusedInput& input, int m, int64_t begin, int64_t end, float* y,
                   int64_t ldy) {
  constexpr decltype(&OneRow<1>) kRows[] = {&OneRow<1>, &OneRow<2>, &OneRow<3>, &OneRow<4>};
  for (int64_t o = begin; o < end; ++o) kRows[m - 1](input, o, y, ldy);
}

}  // namespace quantmill::nf4

#endif  // defined(__x86_64__)
