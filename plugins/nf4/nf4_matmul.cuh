// y[m, out] = x[m, in] W^T with packed W, m <= 16, f32 sums. Three kernels:
//
//   1. nf4_plain_kernel1: any shape; a block per output, weights one by one. For `in` that is no
//      multiple of 8, and as the one to compare with.
//   2. nf4_tiles_kernel1 (nf4_tiles.cuh): tensor cores, for prepacked weights with f16 and bf16.
//   3. nf4_rows_kernel1: the rest; a word of codes (8 weights, one block of the format) at a time.
//
//      y[r, o] = sum over words of absmax[word] * (sum over its 8 weights of codebook[code] * x)
//
//      A block of 128 threads has kRows outputs; its four warps share out the words of a row:
//
//        row o    |w0: 32 words|w1|w2|w3|w0: 32 words|w1|w2|w3| ...      lane l takes word l
//
//      so that a warp reads 128 neighbouring bytes of codes per row, and 512 of x, which serve all
//      kRows outputs. kUnroll such steps are loaded before the first is used. Sums are joined by
//      shuffles in a warp and through shared memory across warps, always in the same order.
//
//      Cost per weight: two integer operations, one lookup in shared memory (16 floats in 16 banks:
//      lanes that read one bank read one address), m multiply-adds. At 0.5625 bytes a weight (B =
//      64) an H100 reads about 24 weights a cycle and SM at its ceiling of 2982 GB/s; four
//      operations a weight allow 32 at m = 1.
//
// Assumptions of 3 (checked before the launch): in % 8 == 0, so that a word lies in one row and,
// since blocks are multiples of 32, in one block; x is 16-byte aligned, codes 4-byte aligned. CPU
// reference: CpuMatmul in nf4_cpu.cc. Versions: 1 as described.
#ifndef QUANTMILL_PLUGINS_NF4_NF4_MATMUL_CUH_
#define QUANTMILL_PLUGINS_NF4_NF4_MATMUL_CUH_

#include <type_traits>

#include "nf4_device.cuh"
#include "nf4_math.h"
#include "nf4_tiles.cuh"
#include "quantmill/sdk/cuda.hpp"

namespace quantmill::nf4 {

inline constexpr int kMatmulThreads = 128;
inline constexpr int kMatmulWarps = kMatmulThreads / 32;

// x: [m, in], y: [m, out]. One block per output.
template <class T>
__global__ void __launch_bounds__(kMatmulThreads)
    nf4_plain_kernel1(DeviceWeight w, const T* x, int m, T* y) {
  __shared__ float shared[kMatmulThreads];
  const int64_t row = blockIdx.x;
  float sums[kCudaMaxRows] = {};
  for (int64_t k = threadIdx.x; k < w.in; k += kMatmulThreads) {
    const int64_t i = row * w.in + k;
    const float value = w.codebook[LoadCode(w, i)] * LoadAbsmax(w, i >> w.block_shift);
#pragma unroll
    for (int r = 0; r < kCudaMaxRows; ++r) {
      if (r < m) sums[r] += value * AsFloat(x[r * w.in + k]);
    }
  }
#pragma unroll
  for (int r = 0; r < kCudaMaxRows; ++r) {
    if (r >= m) break;  // the same in every thread
    shared[threadIdx.x] = sums[r];
    __syncthreads();
    for (int width = kMatmulThreads / 2; width > 0; width /= 2) {
      if (threadIdx.x < width) shared[threadIdx.x] += shared[threadIdx.x + width];
      __syncthreads();
    }
    if (threadIdx.x == 0) y[r * w.out + row] = FromFloat<T>(shared[0]);
    __syncthreads();
  }
}

// Eight neighbouring values of x.
__device__ inline void LoadEight(const float* x, float (&out)[8]) {
  const float4 a = *reinterpret_cast<const float4*>(x);
  const float4 b = *reinterpret_cast<const float4*>(x + 4);
  out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
  out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
}
__device__ inline float2 Widen(__half2 pair) { return __half22float2(pair); }
__device__ inline float2 Widen(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
template <class T, class Pair>
__device__ inline void LoadEightHalves(const T* x, float (&out)[8]) {
  const uint4 bits = *reinterpret_cast<const uint4*>(x);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Pair pair;
    static_assert(sizeof pair == sizeof words[i]);
    memcpy(&pair, &words[i], sizeof pair);
    const float2 two = Widen(pair);
    out[2 * i] = two.x;
    out[2 * i + 1] = two.y;
  }
}
__device__ inline void LoadEight(const __half* x, float (&out)[8]) {
  LoadEightHalves<__half, __half2>(x, out);
}
__device__ inline void LoadEight(const __nv_bfloat16* x, float (&out)[8]) {
  LoadEightHalves<__nv_bfloat16, __nv_bfloat162>(x, out);
}

// Value of a code: entry of a table of 16 floats in shared memory at an address divisible by 64, so
// that shifting and one logic operation make the address. `field`: 0..7, in the order of the
// weights; even ones are in the high half of their byte. Volatile: not to be moved above the
// barrier behind which the table is filled.
__device__ inline float LookUp(uint32_t table, uint32_t word, int field) {
  const int bit = 8 * (field / 2) + (field % 2 == 0 ? 4 : 0);
  const uint32_t offset = (bit == 0 ? word << 2 : word >> (bit - 2)) & 0x3Cu;
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(offset | table));
  return value;
}

// Adds the products of one word per output with kM rows of x (those below m) to the sums.
template <class T, int kM, int kRows>
__device__ inline void AddWord(uint32_t table, const uint32_t (&codes)[kRows],
                               const float (&absmax)[kRows], const T* x, int64_t row_stride, int m,
                               float (&sums)[kRows][kM]) {
  float values[kRows][8];
#pragma unroll
  for (int o = 0; o < kRows; ++o) {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[o][i] = LookUp(table, codes[o], i);
  }
#pragma unroll
  for (int r = 0; r < kM; ++r) {
    if (kM > 1 && r >= m) break;  // the same in every thread
    float eight[8];
    LoadEight(x + r * row_stride, eight);
#pragma unroll
    for (int o = 0; o < kRows; ++o) {
      float part = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) part += values[o][i] * eight[i];
      sums[o][r] += absmax[o] * part;
    }
  }
}

// Sums over the lanes of a warp, in lane 0 of every sum.
template <int kM, int kRows>
__device__ inline void JoinWarp(float (&sums)[kRows][kM]) {
#pragma unroll
  for (int o = 0; o < kRows; ++o) {
#pragma unroll
    for (int r = 0; r < kM; ++r) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        sums[o][r] += __shfl_xor_sync(0xFFFFFFFFu, sums[o][r], offset);
      }
    }
  }
}

// Where codes and factors lie.
enum class Layout { kFloats, kBytes, kTiles };

// Word `word` of the codes of a row, and its factor. `words` and 2^word_shift: of a row, of a
// block.
template <Layout kLayout>
__device__ inline void LoadWord(const DeviceWeight& w, int64_t row, int64_t word, int64_t words,
                                int word_shift, uint32_t* codes, float* absmax) {
  if constexpr (kLayout == Layout::kTiles) {
    *codes = LoadTileWord(w, row, word * 8);
    *absmax = LoadTileAbsmax(w, row, word * 8);
  } else {
    const int64_t at = row * words + word;
    *codes = __ldcs(reinterpret_cast<const uint32_t*>(w.codes) + at);
    *absmax = LoadAbsmaxOf<kLayout == Layout::kBytes>(w, at >> word_shift);
  }
}

// x: [m, in], y: [m, out], 1 <= m <= kM. Block b has outputs b * kRows ...
template <class T, Layout kLayout, int kM, int kRows, int kUnroll>
__global__ void __launch_bounds__(kMatmulThreads)
    nf4_rows_kernel1(DeviceWeight w, const T* x, int m, T* y) {
  __shared__ alignas(64) float codebook[kCodebookSize];
  __shared__ float joined[kMatmulWarps][kRows * kM];
  if (threadIdx.x < kCodebookSize) codebook[threadIdx.x] = w.codebook[threadIdx.x];
  __syncthreads();
  const uint32_t table = static_cast<uint32_t>(__cvta_generic_to_shared(codebook));
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t words = w.in / 8;
  const int word_shift = w.block_shift - 3;  // words per block, log2
  float sums[kRows][kM] = {};
  for (int64_t base = 0; base < words; base += kUnroll * kMatmulThreads) {
    uint32_t loaded[kUnroll][kRows];
    float absmax[kUnroll][kRows];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t word = base + u * kMatmulThreads + threadIdx.x;
#pragma unroll
      for (int o = 0; o < kRows; ++o) {
        loaded[u][o] = 0u;
        absmax[u][o] = 0.0f;
        if (word >= words || first + o >= w.out) continue;
        LoadWord<kLayout>(w, first + o, word, words, word_shift, &loaded[u][o], &absmax[u][o]);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t word = base + u * kMatmulThreads + threadIdx.x;
      if (word >= words) break;
      AddWord<T, kM, kRows>(table, loaded[u], absmax[u], x + word * 8, w.in, m, sums);
    }
  }
  JoinWarp<kM, kRows>(sums);
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int o = 0; o < kRows; ++o) {
#pragma unroll
      for (int r = 0; r < kM; ++r) joined[threadIdx.x / 32][o * kM + r] = sums[o][r];
    }
  }
  __syncthreads();
  const int o = static_cast<int>(threadIdx.x) / kM, r = static_cast<int>(threadIdx.x) % kM;
  if (o >= kRows || r >= m || first + o >= w.out) return;
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kMatmulWarps; ++warp) sum += joined[warp][o * kM + r];
  y[r * w.out + first + o] = FromFloat<T>(sum);
}

template <class T, int kM, int kRows, int kUnroll>
qm_status LaunchRows(qm_call* call, const DeviceWeight& w, const T* x, int m, T* y) {
  static_assert(kRows * kM <= kMatmulThreads, "a thread writes one sum at most");
  const unsigned blocks = static_cast<unsigned>((w.out + kRows - 1) / kRows);
  auto kernel = nf4_rows_kernel1<T, Layout::kFloats, kM, kRows, kUnroll>;
  if (w.absmax_byte != nullptr) kernel = nf4_rows_kernel1<T, Layout::kBytes, kM, kRows, kUnroll>;
  if constexpr (std::is_same_v<T, float>) {
    if (w.tiles != nullptr) kernel = nf4_rows_kernel1<T, Layout::kTiles, kM, kRows, kUnroll>;
  }
  kernel<<<blocks, kMatmulThreads, 0, qm::Stream(call)>>>(w, x, m, y);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

template <class T>
qm_status MatmulOf(qm_call* call, const DeviceWeight& w, const void* x_data, int m, void* y_data) {
  const T* x = static_cast<const T*>(x_data);
  T* y = static_cast<T*>(y_data);
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  if (w.tiles != nullptr && !aligned) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, "x must lie at a multiple of 16 bytes");
  }
  if constexpr (!std::is_same_v<T, float>) {
    if (w.tiles != nullptr) {
      return m <= 8 ? LaunchTiles<T, 1>(call, w, x, m, y) : LaunchTiles<T, 2>(call, w, x, m, y);
    }
  }
  if (w.tiles == nullptr &&
      (w.in % 8 != 0 || !aligned || reinterpret_cast<uintptr_t>(w.codes) % 4 != 0)) {
    nf4_plain_kernel1<<<static_cast<unsigned>(w.out), kMatmulThreads, 0, qm::Stream(call)>>>(w, x,
                                                                                             m, y);
    QM_CUDA(call, cudaGetLastError());
    return QM_OK;
  }
  if (m == 1) return LaunchRows<T, 1, 4, 2>(call, w, x, m, y);
  if (m == 2) return LaunchRows<T, 2, 4, 2>(call, w, x, m, y);
  if (m <= 4) return LaunchRows<T, 4, 4, 1>(call, w, x, m, y);
  if (m <= 8) return LaunchRows<T, 8, 4, 1>(call, w, x, m, y);
  return LaunchRows<T, 16, 2, 1>(call, w, x, m, y);
}

}  // namespace quantmill::nf4

#endif  // QUANTMILL_PLUGINS_NF4_NF4_MATMUL_CUH_
