// The fused product around one row of codes: what AVX2 and AVX-512 share.
#ifndef QUANTMILL_PLUGINS_AFFINE_AFFINE_FUSED_H_
#define QUANTMILL_PLUGINS_AFFINE_AFFINE_FUSED_H_

#include "affine.h"

namespace affine {

// Isa::OneRow<Bits, M>(input, words, scale, zero, y, ldy) multiplies one row of codes by M rows of
// x. Compiled for any processor: only OneRow needs its instructions.
template <class Isa, int Bits>
void FusedRowsOfBits(const FusedInput& in, int m, int64_t begin, int64_t end, float* scale,
                     float* zero, float* y, int64_t ldy) {
  const Weight& w = *in.weight;
  for (int64_t o = begin; o < end; ++o) {
    for (int64_t g = 0; g < w.groups; ++g) {
      const ScaleZero sz = LoadScaleZero(w, o, g);
      scale[g] = sz.scale;
      zero[g] = sz.zero;
    }
    const int32_t* words = w.codes + o * w.words;
    FusedInput part = in;
    float* out = y + o;
    int left = m;
    for (; left >= 4; left -= 4, part.x += 4 * in.row_stride, out += 4 * ldy) {
      Isa::template OneRow<Bits, 4>(part, words, scale, zero, out, ldy);
    }
    if (left == 3) Isa::template OneRow<Bits, 3>(part, words, scale, zero, out, ldy);
    if (left == 2) Isa::template OneRow<Bits, 2>(part, words, scale, zero, out, ldy);
    if (left == 1) Isa::template OneRow<Bits, 1>(part, words, scale, zero, out, ldy);
  }
}

// 2, 4 or 8 bits; see FusedRowsAvx2.
template <class Isa>
void FusedRows(const FusedInput& in, int m, int64_t begin, int64_t end, float* scale, float* zero,
               float* y, int64_t ldy) {
  switch (in.weight->params.bits) {
    case 2:
      return FusedRowsOfBits<Isa, 2>(in, m, begin, end, scale, zero, y, ldy);
    case 4:
      return FusedRowsOfBits<Isa, 4>(in, m, begin, end, scale, zero, y, ldy);
    default:
      return FusedRowsOfBits<Isa, 8>(in, m, begin, end, scale, zero, y, ldy);
  }
}

}  // namespace affine

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_FUSED_H_
