// y = x W^T with a byte per weight, on tensor cores. Included by row8_tiles_CODE.cu, one per code.
//
//   y[n, row] = scale[row] * sum_k value(code[row, k]) * x[n, k]
//
// Work is split so: a block computes 16 kRowTiles rows of W times 8 kColTiles rows of x. Its 8
// warps take turns on chunks of 64 input channels, and add their sums in shared memory in a fixed
// order, so that equal inputs give equal bytes. In a chunk, lane (g, t) = (lane / 4, lane mod 4) of
// a warp reads 16 bytes of rows g and g + 8 at channel 16 t:
//
//        channels  0..15   16..31  32..47  48..63
//   row g          t = 0   t = 1   t = 2   t = 3      16 bytes each, one load per lane and row
//
// Each instruction takes the next 4 of these 16 codes (8 with int8 x) and the same channels of x:
// the order of channels inside a sum is free as long as both operands agree, so the format's own
// layout serves and nothing is prepacked. W is the first operand, x^T the second: a single row of x
// wastes only tensor-core time, which is idle when bytes of W are what takes time.
//
// Codes become exact f16 or bf16 numbers in registers; sums are f32 (int32 with int8 x), so nothing
// but x is rounded before the end:
//   int8, f16    byte with its sign flipped under 0x64 is 1024 + (code + 128); less 1152
//   int8, bf16   the low 7 bits under 0x43 are 128 + low; less 128, or 256 where the sign is set
//   e5m2, f16    the byte is the high half of the number
//   others       the fields moved to their places, times 2^(difference of the biases): for e4m3 in
//                f16 (2^8) at the end, in bf16 (2^120, 2^112) at once, exactly
// Versions: 1.
#ifndef QUANTMILL_PLUGINS_EETQ_ROW8_TILES_CUH_
#define QUANTMILL_PLUGINS_EETQ_ROW8_TILES_CUH_

#include <algorithm>

#include "quantmill/sdk/cuda.hpp"
#include "quantmill/sdk/mma.cuh"
#include "row8_cuda.h"

namespace eetq {

constexpr int kWarps = 8;
constexpr int kChunk = 64;  // channels of a warp's turn

__device__ inline __half2 AsHalf2(uint32_t bits) { return *reinterpret_cast<__half2*>(&bits); }
__device__ inline __nv_bfloat162 AsBf162(uint32_t bits) {
  return *reinterpret_cast<__nv_bfloat162*>(&bits);
}
__device__ inline uint32_t Bits(__half2 value) { return *reinterpret_cast<uint32_t*>(&value); }
__device__ inline uint32_t Bits(__nv_bfloat162 value) {
  return *reinterpret_cast<uint32_t*>(&value);
}

// (a & b) | c in one instruction; the compiler does not always find it.
__device__ inline uint32_t AndOr(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

// Codes 2 kPair and 2 kPair + 1 of the four in `q` as two numbers of type T, without the factor
// kFactor.
template <Code kCode, class T>
struct Decoder;

template <>
struct Decoder<Code::kInt8, __half> {
  static constexpr float kFactor = 1.0f;
  template <int kPair>
  static __device__ inline uint32_t Run(uint32_t q) {
    const uint32_t fields =
        __byte_perm(q ^ 0x80808080u, 0x64646464u, kPair == 0 ? 0x4140u : 0x4342u);
    return Bits(__hsub2(AsHalf2(fields), AsHalf2(0x64806480u)));
  }
};

template <>
struct Decoder<Code::kInt8, __nv_bfloat16> {
  static constexpr float kFactor = 1.0f;
  template <int kPair>
  static __device__ inline uint32_t Run(uint32_t q) {
    const uint32_t fields = __byte_perm(q, 0u, kPair == 0 ? 0x4140u : 0x4342u);
    const uint32_t low = AndOr(fields, 0x007F007Fu, 0x43004300u);
    const uint32_t offset = AndOr(fields, 0x00800080u, 0xC300C300u);  // -128 or -256
    return Bits(__hadd2(AsBf162(low), AsBf162(offset)));
  }
};

// Two bytes, each the high half of 16 bits.
template <int kPair>
__device__ inline uint32_t HighBytes(uint32_t q) {
  return __byte_perm(q, 0u, kPair == 0 ? 0x1404u : 0x3424u);
}

template <>
struct Decoder<Code::kE4M3, __half> {
  static constexpr float kFactor = 256.0f;  // 2^(15 - 7)
  template <int kPair>
  static __device__ inline uint32_t Run(uint32_t q) {
    const uint32_t fields = HighBytes<kPair>(q);
    return AndOr(fields, 0x80008000u, (fields & 0x7F007F00u) >> 1);
  }
};

template <>
struct Decoder<Code::kE5M2, __half> {
  static constexpr float kFactor = 1.0f;
  template <int kPair>
  static __device__ inline uint32_t Run(uint32_t q) {
    return HighBytes<kPair>(q);
  }
};

template <>
struct Decoder<Code::kE4M3, __nv_bfloat16> {
  static constexpr float kFactor = 1.0f;
  template <int kPair>
  static __device__ inline uint32_t Run(uint32_t q) {
    const uint32_t fields = HighBytes<kPair>(q);
    const uint32_t bits = AndOr(fields, 0x80008000u, (fields & 0x7F007F00u) >> 4);
    return Bits(__hmul2(AsBf162(bits), AsBf162(0x7B807B80u)));  // 2^(127 - 7)
  }
};

template <>
struct Decoder<Code::kE5M2, __nv_bfloat16> {
  static constexpr float kFactor = 1.0f;
  template <int kPair>
  static __device__ inline uint32_t Run(uint32_t q) {
    const uint32_t fields = HighBytes<kPair>(q);
    const uint32_t bits = AndOr(fields, 0x80008000u, (fields & 0x7F007F00u) >> 3);
    return Bits(__hmul2(AsBf162(bits), AsBf162(0x77807780u)));  // 2^(127 - 15)
  }
};

template <>
struct Decoder<Code::kInt8, int8_t> {
  static constexpr float kFactor = 1.0f;
};

// Read once per block: not worth a place in L1.
__device__ inline uint4 LoadCodes(const uint8_t* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// d += a b; the shapes are m16n8k16, and m16n8k32 for int8.
template <class X>
__device__ inline void Multiply(float* d, const uint32_t* a, const uint32_t* b, X type) {
  qm::Mma16816(a, b[0], b[1], d, type);
}
__device__ inline void Multiply(int* d, const uint32_t* a, const uint32_t* b, int8_t) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class X>
struct Types {
  using Sum = float;
  static constexpr int kVectors = 2;  // of 16 bytes, that 16 values of x fill
};
template <>
struct Types<int8_t> {
  using Sum = int;
  static constexpr int kVectors = 1;
};

// One chunk of one row tile: `low` and `high` are the lane's codes of rows g and g + 8, x its 16
// values of each column tile, sums [kColTiles][4].
template <Code kCode, class X, int kColTiles>
__device__ inline void AddChunk(const uint4& low, const uint4& high,
                                const uint4 (&x)[kColTiles][Types<X>::kVectors],
                                typename Types<X>::Sum (&sums)[kColTiles][4]) {
  const uint32_t q[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
  constexpr bool kWhole = std::is_same_v<X, int8_t>;
#pragma unroll
  for (int j = 0; j < (kWhole ? 2 : 4); ++j) {
    uint32_t a[4];
    if constexpr (kWhole) {
      a[0] = q[0][2 * j];
      a[1] = q[1][2 * j];
      a[2] = q[0][2 * j + 1];
      a[3] = q[1][2 * j + 1];
    } else {
      a[0] = Decoder<kCode, X>::template Run<0>(q[0][j]);
      a[1] = Decoder<kCode, X>::template Run<0>(q[1][j]);
      a[2] = Decoder<kCode, X>::template Run<1>(q[0][j]);
      a[3] = Decoder<kCode, X>::template Run<1>(q[1][j]);
    }
#pragma unroll
    for (int c = 0; c < kColTiles; ++c) {
      const uint4& v = x[c][kWhole ? 0 : j / 2];
      const uint32_t b[2] = {j % 2 == 0 ? v.x : v.z, j % 2 == 0 ? v.y : v.w};
      Multiply(sums[c], a, b, X{});
    }
  }
}

template <Code kCode, class X, int kRowTiles, int kColTiles>
__global__ void __launch_bounds__(kWarps * 32, 2) row8_tiles_kernel1(DeviceProduct p) {
  using Sum = typename Types<X>::Sum;
  constexpr int kVectors = Types<X>::kVectors;
  constexpr int kUnroll = kRowTiles * kColTiles == 1 ? 4 : 2;  // chunks whose loads are under way
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * (16 * kRowTiles);
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * (8 * kColTiles);
  const int64_t chunks = (p.in + kChunk - 1) / kChunk;
  const X* x = static_cast<const X*>(p.x);

  Sum sums[kRowTiles][kColTiles][4] = {};
  for (int64_t chunk = warp; chunk < chunks; chunk += kWarps * kUnroll) {
    uint4 codes[kUnroll][kRowTiles][2];
    uint4 values[kUnroll][kColTiles][kVectors];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      // `in` is a multiple of 16: a lane's 16 channels are all there or none is.
      const int64_t k = (chunk + u * kWarps) * kChunk + t * 16;
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t row = first_row + r * 16 + h * 8 + g;
          codes[u][r][h] = make_uint4(0, 0, 0, 0);  // the code of 0 in every type
          if (k < p.in && row < p.out) codes[u][r][h] = LoadCodes(p.codes + row * p.in + k);
        }
      }
#pragma unroll
      for (int c = 0; c < kColTiles; ++c) {
        const int64_t n = first_column + c * 8 + g;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          values[u][c][v] = make_uint4(0, 0, 0, 0);
          if (k < p.in && n < p.rows) {
            values[u][c][v] = reinterpret_cast<const uint4*>(x + n * p.in + k)[v];
          }
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        AddChunk<kCode, X, kColTiles>(codes[u][r][0], codes[u][r][1], values[u], sums[r]);
      }
    }
  }

  // [warp][row tile][column tile][lane][4]
  constexpr int kTiles = kRowTiles * kColTiles;
  __shared__ Sum shared[kWarps][kTiles * 128];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int c = 0; c < kColTiles; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        shared[warp][(r * kColTiles + c) * 128 + lane * 4 + i] = sums[r][c][i];
      }
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < kTiles * 128; e += kWarps * 32) {
    Sum sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared[w][e];
    // Element i of a lane of a tile: row g + 8 (i / 2), column 2 t + i mod 2.
    const int tile = e / 128, of_lane = e % 128 / 4, i = e % 4;
    const int64_t row = first_row + tile / kColTiles * 16 + i / 2 * 8 + of_lane / 4;
    const int64_t n = first_column + tile % kColTiles * 8 + of_lane % 4 * 2 + i % 2;
    if (row >= p.out || n >= p.rows) continue;
    StoreResult(p, n, row, static_cast<float>(sum) * Decoder<kCode, X>::kFactor);
  }
}

template <Code kCode, class X, int kRowTiles, int kColTiles>
qm_status LaunchTiles(qm_call* call, DeviceProduct p) {
  constexpr int64_t kColumns = 8 * kColTiles;
  constexpr int64_t kMostRows = 65535 * kColumns;  // of the grid's y
  const int64_t rows = p.rows;
  const unsigned blocks = static_cast<unsigned>((p.out + 16 * kRowTiles - 1) / (16 * kRowTiles));
  const char* x = static_cast<const char*>(p.x);
  char* y = static_cast<char*>(p.y);
  const float* row_scale = p.row_scale;
  for (int64_t first = 0; first < rows; first += kMostRows) {
    p.rows = std::min(kMostRows, rows - first);
    p.x = x + first * p.in * static_cast<int64_t>(sizeof(X));
    p.y = y + first * p.out * qm::ElementSize(p.y_dtype);
    if (row_scale != nullptr) p.row_scale = row_scale + first;
    const dim3 grid(blocks, static_cast<unsigned>((p.rows + kColumns - 1) / kColumns));
    row8_tiles_kernel1<kCode, X, kRowTiles, kColTiles>
        <<<grid, kWarps * 32, 0, qm::Stream(call)>>>(p);
    QM_CUDA(call, cudaGetLastError());
  }
  return QM_OK;
}

// Few rows of x: many blocks, each reading little of x. More: each of its bytes serves twice.
template <Code kCode, class X>
qm_status ChooseTiles(qm_call* call, const DeviceProduct& p) {
  if (p.rows <= 2) return LaunchTiles<kCode, X, 1, 1>(call, p);
  if (p.rows <= 8) return LaunchTiles<kCode, X, 2, 1>(call, p);
  return LaunchTiles<kCode, X, 2, 2>(call, p);
}

template <Code kCode>
qm_status MultiplyTiles(qm_call* call, const DeviceProduct& p, qm_dtype x_dtype) {
  if constexpr (kCode == Code::kInt8) {
    if (x_dtype == QM_I8) return ChooseTiles<kCode, int8_t>(call, p);
  }
  if (x_dtype == QM_F16) return ChooseTiles<kCode, __half>(call, p);
  return ChooseTiles<kCode, __nv_bfloat16>(call, p);
}

}  // namespace eetq

#endif  // QUANTMILL_PLUGINS_EETQ_ROW8_TILES_CUH_
