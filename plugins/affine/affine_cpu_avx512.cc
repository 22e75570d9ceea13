// Fused dequantize-and-multiply with AVX-512: 16 words of codes at a time, weights never leave
// registers. Compiled for every x86-64; called only where the processor has the instructions.
#if defined(__x86_64__)

#include <immintrin.h>

#include "affine_fused.h"

#define QM_AVX512 __attribute__((target("avx512f,avx512bw")))

namespace affine {
namespace {

constexpr int kLanes = 16;

// Sums over j of the values of field j times x, for M rows; A sums per row shorten the chain of
// dependent additions.
template <int M, int A>
struct Sums {
  __m512 value[M][A];
};

// A block inside one group of at most 4 bits: the value of each code is looked up. vpermps reads
// four bits of its index, so that a shift is all the unpacking there is.
template <int Bits, int M, int A>
QM_AVX512 inline void AddByTable(__m512i words, __m512 table, const float* x, int64_t stride,
                                 Sums<M, A>* sums) {
  for (int j = 0; j < 32 / Bits; ++j) {
    const __m512 value =
        _mm512_permutexvar_ps(_mm512_srli_epi32(words, static_cast<unsigned>(j * Bits)), table);
    for (int r = 0; r < M; ++r) {
      const __m512 xv = _mm512_loadu_ps(x + r * stride + j * kLanes);
      sums->value[r][j % A] = _mm512_fmadd_ps(value, xv, sums->value[r][j % A]);
    }
  }
}

template <int Bits, int M, int A>
QM_AVX512 inline void AddByArithmetic(__m512i words, __m512 scale, __m512 zero, const float* x,
                                      int64_t stride, Sums<M, A>* sums) {
  const __m512i mask = _mm512_set1_epi32((1 << Bits) - 1);
  for (int j = 0; j < 32 / Bits; ++j) {
    const __m512i code =
        _mm512_and_si512(_mm512_srli_epi32(words, static_cast<unsigned>(j * Bits)), mask);
    const __m512 value = _mm512_mul_ps(scale, _mm512_sub_ps(_mm512_cvtepi32_ps(code), zero));
    for (int r = 0; r < M; ++r) {
      const __m512 xv = _mm512_loadu_ps(x + r * stride + j * kLanes);
      sums->value[r][j % A] = _mm512_fmadd_ps(value, xv, sums->value[r][j % A]);
    }
  }
}

// Code of each of the 16 entries of a lookup table: entry e stands for code e mod 2^Bits.
template <int Bits>
QM_AVX512 inline __m512 TableCodes() {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_cvtepi32_ps(_mm512_and_si512(lane, _mm512_set1_epi32((1 << Bits) - 1)));
}

struct Avx512 {
  template <int Bits, int M>
  QM_AVX512 static void OneRow(const FusedInput& in, const int32_t* words, const float* scale,
                               const float* zero, float* y, int64_t ldy) {
    constexpr int A = M == 1 ? 4 : M == 2 ? 2 : 1;
    constexpr int64_t kBlock = static_cast<int64_t>(kLanes) * (32 / Bits);
    Sums<M, A> sums;
    for (int r = 0; r < M; ++r) {
      for (int a = 0; a < A; ++a) sums.value[r][a] = _mm512_setzero_ps();
    }
    const __m512 codes = TableCodes<Bits>();
    for (int64_t b = 0; b < in.blocks; ++b) {
      const int64_t left = in.weight->words - b * kLanes;
      const __mmask16 some = left >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
      const __m512i packed = _mm512_maskz_loadu_epi32(some, words + b * kLanes);
      const float* x = in.x + b * kBlock;
      const int32_t* group = in.group + b * kLanes;
      const int32_t first = group[0];
      if (in.uniform && Bits <= 4) {
        const __m512 table = _mm512_mul_ps(_mm512_set1_ps(scale[first]),
                                           _mm512_sub_ps(codes, _mm512_set1_ps(zero[first])));
        AddByTable<Bits, M, A>(packed, table, x, in.row_stride, &sums);
      } else {
        // A block of 16 words touches at most 16 groups, from `first` on.
        const __m512i index = _mm512_sub_epi32(_mm512_loadu_si512(group), _mm512_set1_epi32(first));
        const __m512 s = _mm512_permutexvar_ps(index, _mm512_loadu_ps(scale + first));
        const __m512 z = _mm512_permutexvar_ps(index, _mm512_loadu_ps(zero + first));
        AddByArithmetic<Bits, M, A>(packed, s, z, x, in.row_stride, &sums);
      }
    }
    for (int r = 0; r < M; ++r) {
      __m512 total = sums.value[r][0];
      for (int a = 1; a < A; ++a) total = _mm512_add_ps(total, sums.value[r][a]);
      y[r * ldy] = _mm512_reduce_add_ps(total);
    }
  }
};

}  // namespace

void FusedRowsAvx512(const FusedInput& input, int m, int64_t begin, int64_t end, float* scale,
                     float* zero, float* y, int64_t ldy) {
  FusedRows<Avx512>(input, m, begin, end, scale, zero, y, ldy);
}

}  // namespace affine

#endif  // defined(__x86_64__)
