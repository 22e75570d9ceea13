// Fused dequantize-and-multiply with AVX-512: 16 bytes of codes at a time, weights never leave
// registers. Compiled for every x86-64; called only where the processor has the instructions.
#if defined(__x86_64__)

#include <immintrin.h>

#include "nf4.h"

#define QM_AVX512 __attribute__((target("avx512f")))

namespace quantmill::nf4 {
namespace {

constexpr int64_t kChunk = 32;  // weights

// One row of codes times M rows of x. The values of a block are the codebook times its factor;
// vpermps reads four bits of its index, so that a shift is all the unpacking there is.
template <int M>
QM_AVX512 void OneRow(const FusedInput& in, int64_t row, float* y, int64_t ldy) {
  const Weight& w = *in.weight;
  const __m512 codebook = _mm512_loadu_ps(w.codebook);
  // Two sums per row of x: shorter chains of dependent additions.
  __m512 even[M], odd[M];
  for (int r = 0; r < M; ++r) even[r] = odd[r] = _mm512_setzero_ps();
  const int64_t first = row * w.in, size = w.params.block_size;
  int64_t block_end = 0;  // of the block whose values are in the table, from the row's start
  __m512 table = codebook;
  for (int64_t k = 0; k < w.in; k += kChunk) {
    if (k >= block_end) {
      const int64_t block = (first + k) / size;
      table = _mm512_mul_ps(codebook, _mm512_set1_ps(w.AbsmaxOf(block)));
      block_end = (block + 1) * size - first;
    }
    const void* bytes = w.codes + (first + k) / 2;
    const __m512i packed =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(bytes)));
    const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 4), table);
    const __m512 low = _mm512_permutexvar_ps(packed, table);
    for (int r = 0; r < M; ++r) {
      const float* x = in.x + r * in.row_stride + k;
      even[r] = _mm512_fmadd_ps(high, _mm512_loadu_ps(x), even[r]);
      odd[r] = _mm512_fmadd_ps(low, _mm512_loadu_ps(x + 16), odd[r]);
    }
  }
  for (int r = 0; r < M; ++r) {
    y[r * ldy + row] = _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r]));
  }
}

}  // namespace

void FusedRowsAvx512(const FusedInput& input, int m, int64_t begin, int64_t end, float* y,
                     int64_t ldy) {
  constexpr decltype(&OneRow<1>) kRows[] = {&OneRow<1>, &OneRow<2>, &OneRow<3>, &OneRow<4>};
  for (int64_t o = begin; o < end; ++o) kRows[m - 1](input, o, y, ldy);
}

}  // namespace quantmill::nf4

#endif  // defined(__x86_64__)
