// Fused dequantize-and-multiply with AVX2: 8 words of codes at a time. See affine_cpu_avx512.cc.
#if defined(__x86_64__)

#include <immintrin.h>

#include "affine_fused.h"

#define QM_AVX2 __attribute__((target("avx2,fma")))

namespace affine {
namespace {

constexpr int kLanes = 8;

QM_AVX2 inline float HorizontalSum(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// The last words of a row, the rest zero: x is zero there.
QM_AVX2 inline __m256i LoadWords(const int32_t* words, int64_t left) {
  if (left >= kLanes) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i some = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left)), lane);
  return _mm256_maskload_epi32(words, some);
}

struct Avx2 {
  template <int Bits, int M>
  QM_AVX2 static void OneRow(const FusedInput& in, const int32_t* words, const float* scale,
                             const float* zero, float* y, int64_t ldy) {
    constexpr int A = M == 1 ? 4 : 1;  // sums per row: shorter chains of dependent additions
    constexpr int64_t kBlock = static_cast<int64_t>(kLanes) * (32 / Bits);
    __m256 sums[M][A];
    for (int r = 0; r < M; ++r) {
      for (int a = 0; a < A; ++a) sums[r][a] = _mm256_setzero_ps();
    }
    const __m256i mask = _mm256_set1_epi32((1 << Bits) - 1);
    for (int64_t b = 0; b < in.blocks; ++b) {
      const __m256i packed = LoadWords(words + b * kLanes, in.weight->words - b * kLanes);
      const float* x = in.x + b * kBlock;
      const int32_t* group = in.group + b * kLanes;
      __m256 s = _mm256_set1_ps(scale[group[0]]);
      __m256 z = _mm256_set1_ps(zero[group[0]]);
      if (!in.uniform) {
        const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group));
        s = _mm256_i32gather_ps(scale, index, 4);
        z = _mm256_i32gather_ps(zero, index, 4);
      }
      for (int j = 0; j < 32 / Bits; ++j) {
        const __m256i code = _mm256_and_si256(_mm256_srli_epi32(packed, j * Bits), mask);
        const __m256 value = _mm256_mul_ps(s, _mm256_sub_ps(_mm256_cvtepi32_ps(code), z));
        for (int r = 0; r < M; ++r) {
          const __m256 xv = _mm256_loadu_ps(x + r * in.row_stride + j * kLanes);
          sums[r][j % A] = _mm256_fmadd_ps(value, xv, sums[r][j % A]);
        }
      }
    }
    for (int r = 0; r < M; ++r) {
      __m256 total = sums[r][0];
      for (int a = 1; a < A; ++a) total = _mm256_add_ps(total, sums[r][a]);
      y[r * ldy] = HorizontalSum(total);
    }
  }
};

}  // namespace

void FusedRowsAvx2(const FusedInput& input, int m, int64_t begin, int64_t end, float* scale,
                   float* zero, float* y, int64_t ldy) {
  FusedRows<Avx2>(input, m, begin, end, scale, zero, y, ldy);
}

}  // namespace affine

#endif  // defined(__x86_64__)
