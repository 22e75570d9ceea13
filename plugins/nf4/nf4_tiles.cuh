// y[m, out] = x[m, in] W^T with prepacked W (nf4_tiles.h) on tensor cores, for f16 and bf16, m <=
// 16, f32 sums.
//
//   y[r, o] = sum over blocks of absmax[block] * (sum over its weights of codebook[code] * x)
//
// W is the first operand of mma.m16n8k16, x^T the second, so that up to eight rows of x cost one
// instruction. Values of the codebook are rounded to the type of x, as a dense weight in that type
// would be; factors enter in f32.
//
//   chunk: 64 channels of 16 outputs. All its weights of an output have one factor. Lane 4g + t has
//     channels 16t ... 16t+15 of outputs g and g + 8, and of row g of x: which channels an
//     instruction calls its k is free, as long as both operands agree.
//   block: 8 warps share out the chunks of a tile of 16 outputs; two chunks per warp are on their
//     way while two are multiplied, also across tiles. Sums are joined in a fixed order. A block
//     goes on with tile + blocks.
//   table: a byte of codes becomes two values by one lookup among 256 pairs. They are there 32
//     times, once for each bank, so that lanes never wait for each other. Pairs lie 256 bytes
//     apart, twice what they need: then one byte permutation puts the address together.
//
// Per 1024 weights a warp spends 16 lookups, 16 permutations, 4 mma, 4 multiply-adds and about 10
// instructions for loads. What else was tried, 4096 x 28672 at m = 1 on an H200, 2026-11-30: codes
// and factors read from the format's layout, eight rows per load, 36.2 us (each row is a look at
// the tags of the first-level cache of its own).
//
// Assumptions (checked before the launch): x is 16-byte aligned; there are fewer than 2^32 chunks.
// CPU reference: CpuMatmul in nf4_cpu.cc.
// Versions: 1 as described, 26.4 us there; 27.6 with double quantization.
#ifndef QUANTMILL_PLUGINS_NF4_NF4_TILES_CUH_
#define QUANTMILL_PLUGINS_NF4_NF4_TILES_CUH_

#include <algorithm>

#include "nf4_device.cuh"
#include "nf4_math.h"
#include "nf4_tiles.h"
#include "quantmill/sdk/cuda.hpp"
#include "quantmill/sdk/mma.cuh"

namespace quantmill::nf4 {

inline constexpr int kTileWarps = 8, kTileThreads = 32 * kTileWarps;
inline constexpr uint32_t kChunksAhead = 2;  // per warp
inline constexpr uint32_t kBanks = 32;
inline constexpr int64_t kMostTileBlocks = 3 * 132;  // what an H100 holds at a time

// Read once: not worth a place in the first-level cache.
__device__ inline uint4 LoadOnce(const uint4* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}
__device__ inline float2 LoadOnce(const float2* address) {
  float2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.f32 {%0, %1}, [%2];"
               : "=f"(v.x), "=f"(v.y)
               : "l"(address));
  return v;
}

// Factors of outputs g and g + 8 for one chunk, before their lookups, so that loading them waits
// for nothing.
template <bool kNested>
struct RawFactors {
  float2 absmax;
};
template <>
struct RawFactors<true> {
  uint32_t bytes;
  float2 range;
};

// What widens bytes (WidenAbsmax): copies of the format's tensors.
struct Widening {
  const float* nested_codebook;  // in shared memory
  float offset;
};
__device__ inline float2 Factors(const RawFactors<false>& raw, const Widening&) {
  return raw.absmax;
}
__device__ inline float2 Factors(const RawFactors<true>& raw, const Widening& w) {
  const float low = w.nested_codebook[raw.bytes & 0xFFu], high = w.nested_codebook[raw.bytes >> 8];
  return make_float2(__fadd_rn(__fmul_rn(low, raw.range.x), w.offset),
                     __fadd_rn(__fmul_rn(high, raw.range.y), w.offset));
}

// A lane's part of kChunksAhead chunks of W: of outputs g and g + 8.
template <bool kNested>
struct HeldCodes {
  uint4 codes[kChunksAhead];
  RawFactors<kNested> factors[kChunksAhead];
};

// Reads a warp's chunks of one tile after the other.
template <bool kNested>
class CodeReader {
 public:
  __device__ CodeReader(const DeviceWeight& w, uint32_t chunks, uint32_t warp, uint32_t lane)
      : w_(w),
        tiles_(reinterpret_cast<const uint4*>(w.tiles) + lane),
        chunks_(chunks),
        warp_(warp),
        lane_(lane),
        range_shift_(w.block_shift - kChunkShift + w.nested_shift) {}

  // Goes to the warp's first chunk of a tile.
  __device__ void Start(uint32_t tile) {
    tile_ = tile * chunks_;
    chunk_ = warp_;
    if constexpr (kNested) {  // of outputs beyond the last the last one's, which is not used
      const uint32_t row = tile * kTileOutputs + lane_ / 4, last = w_.out - 1;
      rows_[0] = min(row, last) * chunks_;
      rows_[1] = min(row + 8, last) * chunks_;
    }
  }

  // The next kChunksAhead of them; beyond the last chunk that one again, which is not used then.
  __device__ void Next(HeldCodes<kNested>* held) {
#pragma unroll
    for (uint32_t u = 0; u < kChunksAhead; ++u) {
      const uint32_t chunk = min(chunk_ + u * kTileWarps, chunks_ - 1);
      const uint64_t at = tile_ + chunk;
      held->codes[u] = LoadOnce(tiles_ + at * 32);
      const uint64_t pair = at * 8 + lane_ / 4;
      if constexpr (kNested) {
        held->factors[u].bytes =
            __ldg(reinterpret_cast<const uint16_t*>(w_.tile_absmax_byte) + pair);
        held->factors[u].range =
            make_float2(__ldg(w_.nested_absmax + ((rows_[0] + chunk) >> range_shift_)),
                        __ldg(w_.nested_absmax + ((rows_[1] + chunk) >> range_shift_)));
      } else {
        held->factors[u].absmax = LoadOnce(reinterpret_cast<const float2*>(w_.tile_absmax) + pair);
      }
    }
    chunk_ += kChunksAhead * kTileWarps;
  }

 private:
  const DeviceWeight& w_;
  const uint4* const tiles_;
  const uint32_t chunks_, warp_, lane_;
  const int range_shift_;  // from chunks, counted row by row, to ranges
  uint32_t tile_ = 0;      // its first chunk, counted through all tiles
  uint32_t chunk_ = 0;     // of the tile
  uint32_t rows_[2];       // first chunks of outputs g and g + 8, counted row by row
};

__device__ inline uint32_t PairBits(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t PairBits(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// The table of pairs: that of byte b for lane l at kPairBytes b + 4 l.
constexpr uint32_t kPairBytes = 256;

// Pair of byte `index` of `word`; lane_bytes: 4 l.
__device__ inline uint32_t LookUpPair(const unsigned char* pairs, uint32_t lane_bytes,
                                      uint32_t word, uint32_t index) {
  const uint32_t at = __byte_perm(word, lane_bytes, 0x7704 | index << 4);
  return *reinterpret_cast<const uint32_t*>(pairs + at);
}

// Sixteen channels of one row of x for each tile of eight rows. Lanes whose row is not there keep
// what they have: its products are dropped.
template <class T, int kColumns>
struct HeldRows {
  uint32_t words[kColumns][8] = {};

  __device__ void Load(const T* const (&lane_x)[kColumns], const bool (&there)[kColumns],
                       uint32_t channel) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (!there[c]) continue;
      const auto* at = reinterpret_cast<const uint4*>(lane_x[c] + channel);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 v = __ldg(at + i);
        words[c][4 * i] = v.x, words[c][4 * i + 1] = v.y;
        words[c][4 * i + 2] = v.z, words[c][4 * i + 3] = v.w;
      }
    }
  }
};

// One chunk: sums += factor * (codebook values x).
template <class T, int kColumns>
__device__ inline void AddChunk(const unsigned char* pairs, uint32_t lane_bytes, uint4 codes,
                                float2 absmax, const HeldRows<T, kColumns>& x,
                                float (&sums)[kColumns][4]) {
  float part[kColumns][4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t low = j < 2 ? codes.x : codes.y, high = j < 2 ? codes.z : codes.w;
    const uint32_t byte = j % 2 * 2;
    const uint32_t a[4] = {LookUpPair(pairs, lane_bytes, low, byte),
                           LookUpPair(pairs, lane_bytes, high, byte),
                           LookUpPair(pairs, lane_bytes, low, byte + 1),
                           LookUpPair(pairs, lane_bytes, high, byte + 1)};
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      qm::Mma16816(a, x.words[c][2 * j], x.words[c][2 * j + 1], part[c], T{});
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[c][i] += (i < 2 ? absmax.x : absmax.y) * part[c][i];
  }
}

template <int kColumns>
struct TileShared {
  unsigned char pairs[256 * kPairBytes];
  float nested_codebook[kByteCodebookSize];
  float joined[kTileWarps][kColumns * 128];
};

// x: [m, in], y: [m, out], 1 <= m <= 8 kColumns. Dynamic shared memory: a TileShared.
template <class T, bool kNested, int kColumns>
__global__ void __launch_bounds__(kTileThreads, 3 - kColumns / 2)
    nf4_tiles_kernel1(const __grid_constant__ DeviceWeight w, const T* x, int m, T* y) {
  extern __shared__ __align__(16) unsigned char tile_shared[];
  auto& shared = *reinterpret_cast<TileShared<kColumns>*>(tile_shared);
  const uint32_t thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const auto tiles = static_cast<uint32_t>((w.out + kTileOutputs - 1) / kTileOutputs);
  const auto chunks = static_cast<uint32_t>(w.in / kChunkWeights);
  constexpr uint32_t kStep = kTileWarps * kChunksAhead;
  HeldCodes<kNested> next;
  CodeReader<kNested> reader(w, chunks, warp, lane);
  reader.Start(blockIdx.x);
  reader.Next(&next);

  static_assert(kTileThreads == 256, "a thread fills one pair");
  const uint32_t pair = PairBits(__ldg(w.codebook + thread / 16), __ldg(w.codebook + thread % 16),
                                 T{});  // even weights are in the high half of a byte
#pragma unroll
  for (uint32_t i = 0; i < kBanks; ++i) {
    *reinterpret_cast<uint32_t*>(shared.pairs + thread * kPairBytes + (lane ^ i) * 4) = pair;
  }
  Widening widening = {shared.nested_codebook, 0.0f};
  if constexpr (kNested) {
    static_assert(kTileThreads == kByteCodebookSize, "a thread copies one value");
    shared.nested_codebook[thread] = __ldg(w.nested_codebook + thread);
    widening.offset = __ldg(w.absmax_offset);
  }
  __syncthreads();
  const T* lane_x[kColumns];
  bool there[kColumns];
#pragma unroll
  for (uint32_t c = 0; c < kColumns; ++c) {
    const uint32_t row = c * 8 + lane / 4;
    there[c] = row < static_cast<uint32_t>(m);
    lane_x[c] = x + row * w.in + warp * kChunkWeights + lane % 4 * 16;
  }
  HeldRows<T, kColumns> rows[kChunksAhead];

  for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float sums[kColumns][4] = {};
    const T* x_at[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) x_at[c] = lane_x[c];
#pragma unroll 2
    for (uint32_t first = 0; first < chunks; first += kStep) {
      const HeldCodes<kNested> held = next;
      if (first + kStep >= chunks) reader.Start(min(tile + gridDim.x, tiles - 1));
      reader.Next(&next);
#pragma unroll
      for (uint32_t u = 0; u < kChunksAhead; ++u) {
        if (first + u * kTileWarps + warp >= chunks) break;
        rows[u].Load(x_at, there, u * kTileWarps * kChunkWeights);
        AddChunk<T, kColumns>(shared.pairs, lane * 4, held.codes[u],
                              Factors(held.factors[u], widening), rows[u], sums);
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) x_at[c] += kStep * kChunkWeights;
    }
    // Element i of lane 4g + t: output g + 8 (i / 2), row 2t + i % 2 of x.
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t row = c * 8 + lane % 4 * 2 + i % 2;
        shared.joined[warp][row * kTileOutputs + lane / 4 + i / 2 * 8] = sums[c][i];
      }
    }
    __syncthreads();
    if (thread < kColumns * 128) {
      const uint32_t row = thread / kTileOutputs;
      const int64_t output = tile * kTileOutputs + thread % kTileOutputs;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kTileWarps; ++i) sum += shared.joined[i][thread];
      if (row < static_cast<uint32_t>(m) && output < w.out) {
        y[row * w.out + output] = FromFloat<T>(sum);
      }
    }
    __syncthreads();
  }
}

template <class T, int kColumns>
qm_status LaunchTiles(qm_call* call, const DeviceWeight& w, const T* x, int m, T* y) {
  const auto blocks = static_cast<unsigned>(std::min(TilesOf(w.out), kMostTileBlocks));
  constexpr int kBytes = sizeof(TileShared<kColumns>);
  const auto kernel = w.tile_absmax == nullptr ? nf4_tiles_kernel1<T, true, kColumns>
                                               : nf4_tiles_kernel1<T, false, kColumns>;
  QM_CUDA(call, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<blocks, kTileThreads, kBytes, qm::Stream(call)>>>(w, x, m, y);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

}  // namespace quantmill::nf4

#endif  // QUANTMILL_PLUGINS_NF4_NF4_TILES_CUH_
