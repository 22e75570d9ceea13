// wgmma.mma_async with the first operand in registers: 64 outputs, 16 deep, by kRows rows of x.
#ifndef QUANTMILL_PLUGINS_AFFINE_AFFINE_WGMMA_CUH_
#define QUANTMILL_PLUGINS_AFFINE_AFFINE_WGMMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace affine {

// Before the first product and after registers of products were written.
__device__ inline void FenceProducts() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
__device__ inline void WaitProducts() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
// Makes this thread's copies to shared memory visible to products, which read it by another path.
__device__ inline void FenceShared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Describes the second operand to wgmma: kRows rows of x as rows of 128 bytes, pieces of 16 bytes
// swizzled by row % 8, eight rows after eight rows. `address`: that of the first row plus 32 bytes
// per 16 channels before those of this product; the first row's is a multiple of 1024.
__device__ inline uint64_t DescribeRows(uint32_t address) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kEightRows = 1024 / 16, kUnused = 1;
  return kSwizzle128 | kEightRows << 32 | kUnused << 16 | (address & 0x3FFFFu) / 16;
}

// c += a x^T, or c = a x^T with accumulate = 0. c[4 i + 2 half + k] of lane 4g+t of warp w of four
// is output 16 w + g + 8 half, row 8 i + 2 t + k; a as that of mma.m16n8k16, of the warp's outputs.
template <class T, int kRows>
struct WideProduct;

#define QM_WIDE_PRODUCT_16(TYPE)                                                            \
  asm volatile(                                                                             \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"                                          \
      "wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE                           \
      " {"                                                                                  \
      "%0, %1, %2, %3, %4, %5, %6, %7"                                                      \
      "}, {%8, %9, %10, %11}, %12, p, 1, 1, 0;\n}\n"                                        \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), \
        "+f"(c[7])                                                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(rows), "r"(accumulate))

#define QM_WIDE_PRODUCT_32(TYPE)                                                                \
  asm volatile(                                                                                 \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"                                              \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE                               \
      " {"                                                                                      \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"                    \
      "}, {%16, %17, %18, %19}, %20, p, 1, 1, 0;\n}\n"                                          \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),     \
        "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), \
        "+f"(c[14]), "+f"(c[15])                                                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(rows), "r"(accumulate))

#define QM_WIDE_PRODUCT_64(TYPE)                                                                   \
  asm volatile(                                                                                    \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                 \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                  \
      " {"                                                                                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "                \
      "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                  \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"                                             \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),        \
        "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]),    \
        "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), \
        "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), \
        "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(rows), "r"(accumulate))

#define QM_WIDE_PRODUCT_128(TYPE)                                                                  \
  asm volatile(                                                                                    \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                                 \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                 \
      " {"                                                                                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "                \
      "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "                \
      "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "                \
      "%62, %63"                                                                                   \
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}\n"                                             \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),        \
        "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]),    \
        "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), \
        "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), \
        "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), \
        "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]), \
        "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), "+f"(c[48]), \
        "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]), \
        "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), \
        "+f"(c[63])                                                                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(rows), "r"(accumulate))

#define QM_WIDE_PRODUCT(ROWS)                                                           \
  template <>                                                                           \
  struct WideProduct<__half, ROWS> {                                                    \
    static __device__ inline void Run(const uint32_t* a, uint64_t rows, int accumulate, \
                                      float* c) {                                       \
      QM_WIDE_PRODUCT_##ROWS("f16");                                                    \
    }                                                                                   \
  };                                                                                    \
  template <>                                                                           \
  struct WideProduct<__nv_bfloat16, ROWS> {                                             \
    static __device__ inline void Run(const uint32_t* a, uint64_t rows, int accumulate, \
                                      float* c) {                                       \
      QM_WIDE_PRODUCT_##ROWS("bf16");                                                   \
    }                                                                                   \
  }

QM_WIDE_PRODUCT(16);
QM_WIDE_PRODUCT(32);
QM_WIDE_PRODUCT(64);
QM_WIDE_PRODUCT(128);

}  // namespace affine

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_WGMMA_CUH_
