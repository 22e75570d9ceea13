// Codes of tiles (affine_tiles.h) to operands of mma.m16n8k16 in f16 or bf16. No arithmetic is done
// on a code: its bits are put where a number of T shows them as
//   base + step * code,
// base and step constants of T, of the width, and of which of a lane's two rows it is. The product
// takes both out again once per group, with the sum of x (affine_tile_kernel.cuh).
//   f16: the code is the mantissa of a subnormal number, base 0 and step 2^-24 per lowest bit;
//     tensor cores multiply subnormal numbers exactly.
//   bf16: a product with a subnormal number would leave f32's range; the code is put under 128, of
//     which 7 mantissa bits are the integers that follow. 8 bits do not fit there and go through
//     f32 to code - 128, which is exact.
#ifndef QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_DECODE_CUH_
#define QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_DECODE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "affine_tiles.h"

namespace affine {

// (a & b) | c in one instruction; the compiler does not always find it.
__device__ inline uint32_t AndOr(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

template <class T>
struct Numbers;
template <>
struct Numbers<__half> {
  static constexpr uint32_t kMagic = 0;
  static constexpr uint32_t kOnes = 0x3C003C00u;
  static constexpr float kBase = 0, kStep = 0x1p-24f;
};
template <>
struct Numbers<__nv_bfloat16> {
  static constexpr uint32_t kMagic = 0x43004300u;
  static constexpr uint32_t kOnes = 0x3F803F80u;
  static constexpr float kBase = 128, kStep = 1;
};

__device__ inline uint32_t LoadShared32(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ inline uint32_t LoadShared16(uint32_t address) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
  return v;
}
__device__ inline uint32_t LoadShared8(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ inline uint2 LoadShared64(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}
__device__ inline uint4 LoadShared128(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// Four matrices of 8 rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8. Lane
// 4g+t gets elements 2t and 2t+1 of row g of each: the second operand of mma.m16n8k16.
__device__ inline uint4 LoadMatrices(uint32_t address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// Load reads a lane's words of a unit at a shared address, Run gives the registers of instruction
// j. Base and Step are those of row g (half 0) or g+8 (half 1).
template <class T, int kTileBits>
struct Decoder;

template <class T>
struct Decoder<T, 2> {
  static constexpr int kWords = 1;
  static constexpr float Base(int) { return Numbers<T>::kBase; }
  // Fields of row g+8 stay two bits higher.
  static constexpr float Step(int half) { return Numbers<T>::kStep * (half == 0 ? 1.0f : 4.0f); }
  static __device__ inline void Load(uint32_t unit, int lane, uint32_t* q) {
    q[0] = LoadShared32(unit + lane * 4);
  }
  static __device__ inline void Run(const uint32_t* q, int j, uint32_t* a) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t fields = q[0] >> (8 * j + 2 * i);
      a[i] = AndOr(fields, 0x00030003u, Numbers<T>::kMagic);
      a[i + 1] = AndOr(fields, 0x000C000Cu, Numbers<T>::kMagic);
    }
  }
};

template <class T>
struct Decoder<T, 3> {
  static constexpr int kWords = 2;
  static constexpr float Base(int half) { return Decoder<T, 2>::Base(half); }
  static constexpr float Step(int half) { return Decoder<T, 2>::Step(half); }
  static __device__ inline void Load(uint32_t unit, int lane, uint32_t* q) {
    q[0] = LoadShared32(unit + lane * 4);
    q[1] = __byte_perm(LoadShared16(unit + 128 + lane * 2), 0, 0x4140u);
  }
  static __device__ inline void Run(const uint32_t* q, int j, uint32_t* a) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t fields = q[0] >> (8 * j + 2 * i);
      const int shift = HighBit(j, i) - 2;  // to the place above the field
      const uint32_t high = shift < 0 ? q[1] << -shift : q[1] >> shift;
      a[i] = AndOr(fields, 0x00030003u, AndOr(high, 0x00040004u, Numbers<T>::kMagic));
      a[i + 1] = AndOr(fields, 0x000C000Cu, AndOr(high, 0x00100010u, Numbers<T>::kMagic));
    }
  }
};

template <class T>
struct Decoder<T, 4> {
  static constexpr bool kInPlace = Numbers<T>::kMagic == 0;  // row g+8 four bits higher
  static constexpr int kWords = 2;
  static constexpr float Base(int) { return Numbers<T>::kBase; }
  static constexpr float Step(int half) {
    return Numbers<T>::kStep * (kInPlace && half == 1 ? 16.0f : 1.0f);
  }
  static __device__ inline void Load(uint32_t unit, int lane, uint32_t* q) {
    const uint2 words = LoadShared64(unit + lane * 8);
    q[0] = words.x, q[1] = words.y;
  }
  static __device__ inline void Run(const uint32_t* q, int j, uint32_t* a) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool in_place = kInPlace && i % 2 == 1;
      a[i] = AndOr(q[j] >> (4 * (in_place ? i - 1 : i)), in_place ? 0x00F000F0u : 0x000F000Fu,
                   Numbers<T>::kMagic);
    }
  }
};

template <class T>
struct Decoder<T, 8> {
  static constexpr bool kIsHalf = Numbers<T>::kMagic == 0;
  static constexpr int kWords = 4;
  static constexpr float Base(int) { return kIsHalf ? 0.0f : -128.0f; }
  static constexpr float Step(int) { return Numbers<T>::kStep; }
  static __device__ inline void Load(uint32_t unit, int lane, uint32_t* q) {
    const uint4 words = LoadShared128(unit + lane * 16);
    q[0] = words.x, q[1] = words.y, q[2] = words.z, q[3] = words.w;
  }
  // code - 128: 0x4B000000 is 2^23 with steps of 1 in f32.
  static __device__ inline float Value(uint32_t word, int byte) {
    const uint32_t bits = __byte_perm(word, 0x4B000000u, 0x7650u + static_cast<uint32_t>(byte));
    return __uint_as_float(bits) - 8388736.0f;  // 2^23 + 128
  }
  static __device__ inline void Run(const uint32_t* q, int j, uint32_t* a) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = q[2 * j + i / 2];
      if constexpr (kIsHalf) {
        a[i] = __byte_perm(word, 0, i % 2 == 0 ? 0x4140u : 0x4342u);
      } else {
        const int byte = 2 * (i % 2);
        const __nv_bfloat162 pair = __floats2bfloat162_rn(Value(word, byte), Value(word, byte + 1));
        a[i] = *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
  }
};

}  // namespace affine

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_DECODE_CUH_
