// One product on tensor cores (sm_80 and later), for kernels of packed weights.
//
// Fragments of mma.m16n8k16 of lane 4 g + t (PTX ISA, "Matrix fragments for mma.m16n8k16"); a
// register holds two neighbours along k, the first in its low half:
//   a [16, 16]  rows g, g + 8, g, g + 8; k 2t, 2t, 2t + 8, 2t + 8
//   b [16, 8]   k 2t, 2t + 8; column g
//   c [16, 8]   rows g, g, g + 8, g + 8; columns 2t, 2t + 1, 2t, 2t + 1
// Which columns of a matrix an instruction calls its k is free, as long as a and b agree.
#ifndef QUANTMILL_SDK_MMA_CUH_
#define QUANTMILL_SDK_MMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace qm {

// c += a b, f16 operands, f32 sums. a: 4 registers, b0 and b1 those of b, c: 4 values. Every lane
// of the warp calls it.
__device__ inline void Mma16816(const uint32_t* a, uint32_t b0, uint32_t b1, float* c, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same with bf16 operands.
__device__ inline void Mma16816(const uint32_t* a, uint32_t b0, uint32_t b1, float* c,
                                __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace qm

#endif  // QUANTMILL_SDK_MMA_CUH_
