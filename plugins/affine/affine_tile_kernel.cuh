// y = x W^T with W in tiles (affine_tiles.h), on tensor cores, for f16 and bf16, 1 to 64 rows at a
// time. Not tuned yet; the choices below follow from counting bytes and instructions. Included by
// affine_tiles_DTYPE_BITS.cu, one per dtype and width.
//
// W is the first operand of mma.m16n8k16, x^T the second, so that up to eight rows of x cost one
// instruction per tile, and a single row wastes only tensor-core time, which is idle there. Codes
// become exact small integers code - bias in f16 or bf16; sums within a group are f32;
// scale and zero point enter once per group, in f32:
//   y = sum over groups of scale * (sum (code - bias) x - (zero - bias) * sum x)
// The sum of x comes from the same instruction with a first operand of ones. Nothing but x is
// rounded before the end.
//
//   block: R strips of 16 outputs; its W warps (and the grid's y dimension) split the chunks of the
//   input channels; partial sums are added in a fixed order, so equal inputs give equal bytes.
#ifndef QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_KERNEL_CUH_
#define QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_KERNEL_CUH_

#include "affine_device.cuh"
#include "affine_multiply_tiles.h"
#include "quantmill/sdk/cuda.hpp"

namespace affine {

__device__ inline uint32_t Subtract(uint32_t value, uint32_t constant, __half) {
  const __half2 result = __hsub2(*reinterpret_cast<const __half2*>(&value),
                                 *reinterpret_cast<const __half2*>(&constant));
  return *reinterpret_cast<const uint32_t*>(&result);
}
__device__ inline uint32_t Subtract(uint32_t value, uint32_t constant, __nv_bfloat16) {
  const __nv_bfloat162 result = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&value),
                                        *reinterpret_cast<const __nv_bfloat162*>(&constant));
  return *reinterpret_cast<const uint32_t*>(&result);
}

// (a & b) | c in one instruction; the compiler does not always find it.
__device__ inline uint32_t AndOr(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

// Integers added to a power of two show up in the low mantissa bits: 0x6400 is 1024 in f16 with
// steps of 1, 0x4300 is 128 in bf16 with steps of 1.
template <class T>
struct Magic;
template <>
struct Magic<__half> {
  static constexpr uint32_t kBase = 0x64006400u;
  static constexpr uint32_t kOnes = 0x3C003C00u;
};
template <>
struct Magic<__nv_bfloat16> {
  static constexpr uint32_t kBase = 0x43004300u;
  static constexpr uint32_t kOnes = 0x3F803F80u;
};

// First operand of instruction j of unit `unit` of a chunk: code - bias, bias = 2^(tile bits - 1).
template <class T, int kTileBits>
struct Decoder;

template <class T>
struct Decoder<T, 2> {
  static __device__ inline void Run(const uint32_t* q, int unit, int j, uint32_t* a) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t fields = AndOr(q[unit] >> (2 * (i + 4 * j)), 0x00030003u, Magic<T>::kBase);
      a[i] = Subtract(fields, Magic<T>::kBase + 0x00020002u, T{});
    }
  }
};

template <class T>
struct Decoder<T, 4> {
  static __device__ inline void Run(const uint32_t* q, int unit, int j, uint32_t* a) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t fields = AndOr(q[2 * unit + j] >> (4 * i), 0x000F000Fu, Magic<T>::kBase);
      a[i] = Subtract(fields, Magic<T>::kBase + 0x00080008u, T{});
    }
  }
};

template <>
struct Decoder<__half, 8> {
  static __device__ inline void Run(const uint32_t* q, int, int j, uint32_t* a) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Bytes 0 and 1, or 2 and 3, each under a 0x64.
      const uint32_t fields =
          __byte_perm(q[2 * j + i / 2], 0x64646464u, i % 2 == 0 ? 0x4140u : 0x4342u);
      a[i] = Subtract(fields, 0x64806480u, __half{});
    }
  }
};

template <>
struct Decoder<__nv_bfloat16, 8> {
  // bf16 has 8 significant bits: code - 128 fits, 128 + code would not. Through f32, where
  // 0x4B000000 is 2^23 with steps of 1.
  static __device__ inline float Value(uint32_t word, int byte) {
    const uint32_t bits = __byte_perm(word, 0x4B000000u, 0x7650u + static_cast<uint32_t>(byte));
    return __uint_as_float(bits) - 8388736.0f;  // 2^23 + 128
  }
  static __device__ inline void Run(const uint32_t* q, int, int j, uint32_t* a) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = q[2 * j + i / 2];
      const int byte = 2 * (i % 2);
      const __nv_bfloat162 pair = __floats2bfloat162_rn(Value(word, byte), Value(word, byte + 1));
      a[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
  }
};

// c += a b for one 16x8 tile, 16 deep.
__device__ inline void Mma(const uint32_t* a, uint32_t b0, uint32_t b1, float* c, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void Mma(const uint32_t* a, uint32_t b0, uint32_t b1, float* c, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// N: tiles of 8 rows of x; R: strips per block; W: warps per block.
template <class T, int kTileBits, int N, int R, int W>
struct TileBlock {
  static constexpr int kUnits = UnitsPerChunk(kTileBits);
  static constexpr float kBias = static_cast<float>(1 << (kTileBits - 1));

  const DeviceWeight& w;
  const T* x;
  const int m;
  const bool has_zero;
  const int g, t;  // lane = 4 g + t
  int64_t strip[R];
  float sum[R][N][4] = {};   // finished groups
  float part[R][N][4] = {};  // the group at hand, unscaled
  float x_sum[N][4] = {};    // sums of x over the group at hand; [2] and [3] repeat [0] and [1]
  ScaleZero sz[R][2];        // of rows g and g + 8, of the group at hand
  int64_t group = 0;
  int64_t units_left = 0;  // of the group at hand

  __device__ TileBlock(const DeviceWeight& weight, const T* input, int rows, int lane)
      : w(weight),
        x(input),
        m(rows),
        has_zero(weight.zero != nullptr || weight.bits != weight.tile_bits),
        g(lane / 4),
        t(lane % 4) {
    const int64_t last = w.padded_out / kStripRows - 1;
    // A strip beyond the end repeats the last one; its results are dropped.
#pragma unroll
    for (int r = 0; r < R; ++r) strip[r] = min(static_cast<int64_t>(blockIdx.x) * R + r, last);
  }

  __device__ void StartGroup() {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      sz[r][0] = LoadDeviceScaleZero(w, strip[r] * kStripRows + g, group);
      sz[r][1] = LoadDeviceScaleZero(w, strip[r] * kStripRows + g + 8, group);
    }
  }

  __device__ void Seek(int64_t unit) {
    const int64_t group_units = w.group_size / kUnit;
    group = unit / group_units;
    units_left = group_units - unit % group_units;
    StartGroup();
  }

  __device__ void FinishGroup() {
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const ScaleZero& s = sz[r][c / 2];
          float value = part[r][n][c];
          if (has_zero) value -= (s.zero - kBias) * x_sum[n][c];
          sum[r][n][c] += s.scale * value;
          part[r][n][c] = 0;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) x_sum[n][c] = 0;
    }
  }

  __device__ void AddUnit(const uint32_t (&q)[R][4], int in_chunk, int64_t unit) {
    uint4 b[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int row = n * 8 + g;
      b[n] = make_uint4(0, 0, 0, 0);
      if (row < m) {
        b[n] = __ldg(reinterpret_cast<const uint4*>(x + row * w.in + unit * kUnit + 8 * t));
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        uint32_t a[4];
        Decoder<T, kTileBits>::Run(q[r], in_chunk, j, a);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          Mma(a, j == 0 ? b[n].x : b[n].z, j == 0 ? b[n].y : b[n].w, part[r][n], T{});
        }
      }
      if (has_zero) {
        const uint32_t ones[4] = {Magic<T>::kOnes, Magic<T>::kOnes, Magic<T>::kOnes,
                                  Magic<T>::kOnes};
#pragma unroll
        for (int n = 0; n < N; ++n) {
          Mma(ones, j == 0 ? b[n].x : b[n].z, j == 0 ? b[n].y : b[n].w, x_sum[n], T{});
        }
      }
    }
  }

  __device__ void LoadChunk(int64_t chunk, int lane, uint32_t (&q)[R][4]) const {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      // Read once: do not keep it in the caches at the expense of x.
      const uint4 v = __ldcs(reinterpret_cast<const uint4*>(w.tiles) +
                             (strip[r] * w.chunks + chunk) * 32 + lane);
      q[r][0] = v.x;
      q[r][1] = v.y;
      q[r][2] = v.z;
      q[r][3] = v.w;
    }
  }

  // Chunks [begin, end), two loads ahead of the arithmetic.
  __device__ void Run(int64_t begin, int64_t end, int lane) {
    if (begin >= end) return;
    uint32_t q[3][R][4];
    LoadChunk(begin, lane, q[0]);
    if (begin + 1 < end) LoadChunk(begin + 1, lane, q[1]);
    Seek(begin * kUnits);
    for (int64_t first = begin; first < end; first += 3) {
#pragma unroll
      for (int s = 0; s < 3; ++s) {  // a constant index keeps q in registers
        const int64_t chunk = first + s;
        if (chunk >= end) break;
        if (chunk + 2 < end) LoadChunk(chunk + 2, lane, q[(s + 2) % 3]);
        AddChunk(q[s], chunk);
      }
    }
    FinishGroup();
  }

  __device__ void AddChunk(const uint32_t (&q)[R][4], int64_t chunk) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int64_t unit = chunk * kUnits + i;
      if (unit * kUnit >= w.in) break;
      if (units_left == 0) {
        FinishGroup();
        ++group;
        units_left = w.group_size / kUnit;
        StartGroup();
      }
      AddUnit(q, i, unit);
      --units_left;
    }
  }
};

// x: [m, in] with m <= 8 N; y: [m, out], or with partial != null partial: [gridDim.y, m, out].
template <class T, int kTileBits, int N, int R, int W>
__global__ void __launch_bounds__(32 * W)
    TileKernel(DeviceWeight w, const T* x, int m, T* y, float* partial) {
  constexpr int kValues = R * N * 4;  // per lane
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  TileBlock<T, kTileBits, N, R, W> block(w, x, m, lane);
  const int64_t workers = static_cast<int64_t>(gridDim.y) * W;
  const int64_t worker = static_cast<int64_t>(blockIdx.y) * W + warp;
  block.Run(w.chunks * worker / workers, w.chunks * (worker + 1) / workers, lane);

  __shared__ float shared[W][kValues][32];
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) shared[warp][(r * N + n) * 4 + c][lane] = block.sum[r][n][c];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kValues * 32; i += 32 * W) {
    const int value = i / 32, of_lane = i % 32;
    float total = 0;
    for (int v = 0; v < W; ++v) total += shared[v][value][of_lane];
    const int r = value / (N * 4), n = value / 4 % N, c = value % 4;
    const int64_t output =
        (static_cast<int64_t>(blockIdx.x) * R + r) * kStripRows + of_lane / 4 + (c / 2) * 8;
    const int64_t row = n * 8 + of_lane % 4 * 2 + c % 2;
    if (output >= w.out || row >= m) continue;
    if (partial == nullptr) {
      y[row * w.out + output] = FromFloat<T>(total);
    } else {
      partial[(blockIdx.y * static_cast<int64_t>(m) + row) * w.out + output] = total;
    }
  }
}

// y[i] = sum over splits of partial[split, i].
template <class T>
__global__ void __launch_bounds__(256)
    CombineKernel(const float* partial, int64_t splits, int64_t count, T* y) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) return;
  float total = 0;
  for (int64_t s = 0; s < splits; ++s) total += partial[s * count + i];
  y[i] = FromFloat<T>(total);
}

template <class T, int kTileBits, int N, int R, int W>
qm_status LaunchTiles(qm_call* call, const DeviceWeight& w, const T* x, int m, T* y,
                      float* partial) {
  const int64_t splits = Splits(w, R, W);
  const int64_t strips = w.padded_out / kStripRows;
  const dim3 grid(static_cast<unsigned>((strips + R - 1) / R), static_cast<unsigned>(splits));
  float* target = splits == 1 ? nullptr : partial;
  TileKernel<T, kTileBits, N, R, W><<<grid, 32 * W, 0, qm::Stream(call)>>>(w, x, m, y, target);
  QM_CUDA(call, cudaGetLastError());
  if (splits == 1) return QM_OK;
  const int64_t count = m * w.out;
  CombineKernel<<<static_cast<unsigned>((count + 255) / 256), 256, 0, qm::Stream(call)>>>(
      partial, splits, count, y);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

template <class T, int kTileBits>
qm_status MultiplyTiles(qm_call* call, const DeviceWeight& w, const T* x, int m, T* y,
                        float* partial) {
  if (m <= 8) {
    return LaunchTiles<T, kTileBits, 1, kFewStrips, kFewWarps>(call, w, x, m, y, partial);
  }
  if (m <= kFewRows) {
    return LaunchTiles<T, kTileBits, 2, kFewStrips, kFewWarps>(call, w, x, m, y, partial);
  }
  if (m <= 32) {
    return LaunchTiles<T, kTileBits, 4, kManyStrips, kManyWarps>(call, w, x, m, y, partial);
  }
  return LaunchTiles<T, kTileBits, 8, kManyStrips, kManyWarps>(call, w, x, m, y, partial);
}

}  // namespace affine

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_KERNEL_CUH_
