// Products with a narrow factor on the GPU, one or a batch of them; the CPU path is lora_cpu.cc.
//
//   c [m, n] (+)= scale a [m, k] b [k, n]
//
// a, b: f32, f16 or bf16, either way round (one stride is 1); c: row-major.
//
// Tensor cores (mma.m16n8k8, tf32) with sums in f32. An f32 operand is split into a part of 11 bits
// and what is left, v = high + low; three products, a_high b_high + a_high b_low + a_low b_high,
// leave out what is below 2^-22 of a product. An operand of 16 bits is its high part.
//
// A CTA of eight warps computes a tile of 64 by 64, a warp 32 by 16 of it, from 32 of k at a time
// in shared memory; while it does, the next 32 are on their way to registers. One of m, n, k is the
// rank, so that the work is small beside the base's product even where the rank fills a part of a
// tile only. A long k with few tiles (x A^T, the gradients) is cut into slices, by the shape alone;
// their sums go to scratch and are added in order: no atomics, the same bytes each time.
//
// Versions: 1 f32 arithmetic, tiles read element by element; 2 as described. A run with rank 64 on
// each of 70 linears of a model of 19 M parameters, 10 M tokens, all included (H200, 2026-11-30):
// 1 76.6 s, 2 32.3 s.
#include <algorithm>

#include "oftq_cuda.h"
#include "oftq_math.h"
#include "quantmill/sdk/cuda.hpp"
#include "quantmill/sdk/plugin.hpp"

namespace quantmill::oftq {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64, kDepth = 32;
constexpr int kVectors = kTile * kDepth / 4 / kThreads;  // of four elements, per thread and operand
constexpr int64_t kFullGrid = 264;                       // tiles that fill a GPU
constexpr int64_t kLeastSlice = 256;

struct Arguments {
  Product p;
  Batch batch;
  int64_t tiles_across, slice;
  bool a_vectors, b_vectors;  // four elements along the axis of stride 1 can be read at once
  float* partial;             // [slices, batch, m, n]; null: the result goes to c
};

// c[at] (+)= scale sum
__device__ inline void StoreFloat(const Product& p, int64_t at, float sum) {
  float value = p.scale * sum;
  if (p.accumulate) value += static_cast<const float*>(p.c)[at];
  if (p.c_dtype == QM_F16) {
    static_cast<qm::F16*>(p.c)[at] = qm::ToF16(value);
  } else if (p.c_dtype == QM_BF16) {
    static_cast<qm::BF16*>(p.c)[at] = qm::ToBF16(value);
  } else {
    static_cast<float*>(p.c)[at] = value;
  }
}

__device__ inline const void* Advanced(const Operand& operand, int64_t elements) {
  return static_cast<const char*>(operand.data) + elements * (operand.dtype == QM_F32 ? 4 : 2);
}

// ---- tiles in shared memory --------------------------------------------------------------------

// Where element (i, d) of a tile lies; i counts rows of a or columns of b, d is the depth. The axis
// of stride 1 in memory stays the inner one. The pitches put the 8 by 4 elements that a warp reads
// together into different banks.
template <bool kAlongDepth>
struct Layout {
  static constexpr int kPitch = kAlongDepth ? kDepth + 4 : kTile + 8;
  static constexpr int kFloats = kPitch * (kAlongDepth ? kTile : kDepth);
  __device__ static int At(int i, int d) { return kAlongDepth ? i * kPitch + d : d * kPitch + i; }
  // First element of vector `piece` of four.
  __device__ static int I(int piece) {
    return kAlongDepth ? piece / (kDepth / 4) : piece % (kTile / 4) * 4;
  }
  __device__ static int D(int piece) {
    return kAlongDepth ? piece % (kDepth / 4) * 4 : piece / (kTile / 4);
  }
};

// Four neighbouring elements as they are stored; of 16 bits, in x and y.
__device__ inline uint4 LoadFour(const void* data, qm_dtype dtype, int64_t at) {
  if (dtype == QM_F32) {
    return *reinterpret_cast<const uint4*>(static_cast<const float*>(data) + at);
  }
  const uint2 pairs = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(data) + at);
  return make_uint4(pairs.x, pairs.y, 0, 0);
}
// The first `count` of them, the rest 0.
__device__ inline uint4 LoadSome(const void* data, qm_dtype dtype, int64_t at, int64_t count) {
  uint32_t bits[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    bits[e] = e >= count        ? 0u
              : dtype == QM_F32 ? static_cast<const uint32_t*>(data)[at + e]
                                : static_cast<const uint16_t*>(data)[at + e];
  }
  if (dtype == QM_F32) return make_uint4(bits[0], bits[1], bits[2], bits[3]);
  return make_uint4(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, 0, 0);
}

template <class T>
__device__ inline float HalfToFloat(uint32_t bits) {
  return qm::ToFloat(T{static_cast<uint16_t>(bits)});
}
template <class T>
__device__ inline float4 HalvesToFloats(uint4 four) {
  return make_float4(HalfToFloat<T>(four.x), HalfToFloat<T>(four.x >> 16), HalfToFloat<T>(four.y),
                     HalfToFloat<T>(four.y >> 16));
}
__device__ inline float4 ToFloats(uint4 four, qm_dtype dtype) {
  if (dtype == QM_F16) return HalvesToFloats<qm::F16>(four);
  if (dtype == QM_BF16) return HalvesToFloats<qm::BF16>(four);
  return make_float4(__uint_as_float(four.x), __uint_as_float(four.y), __uint_as_float(four.z),
                     __uint_as_float(four.w));
}

// One operand of a CTA's tile: wide index `first` + i below `extent`, depth below `end`.
template <bool kAlongDepth>
struct Source {
  const void* data;
  qm_dtype dtype;
  bool vectors;
  int64_t stride;  // of the axis whose stride is not 1
  int64_t first, extent, end;

  // Elements from (i, d), going on along the axis of stride 1; 0 outside.
  __device__ uint4 Four(int64_t i, int64_t d) const {
    const int64_t at = kAlongDepth ? i * stride + d : d * stride + i;
    const int64_t inside = !(i < extent && d < end) ? 0 : kAlongDepth ? end - d : extent - i;
    if (vectors && inside >= 4) return LoadFour(data, dtype, at);
    return LoadSome(data, dtype, at, inside);
  }

  // Starts to read this thread's part of a tile; what waits for it is Put.
  __device__ void Fetch(int64_t depth, uint4 (&held)[kVectors]) const {
    using L = Layout<kAlongDepth>;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int piece = static_cast<int>(threadIdx.x) + v * kThreads;
      held[v] = Four(first + L::I(piece), depth + L::D(piece));
    }
  }

  __device__ void Put(const uint4 (&held)[kVectors], float* tile) const {
    using L = Layout<kAlongDepth>;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int piece = static_cast<int>(threadIdx.x) + v * kThreads;
      *reinterpret_cast<float4*>(tile + L::At(L::I(piece), L::D(piece))) = ToFloats(held[v], dtype);
    }
  }
};

// ---- a warp's part of a tile -------------------------------------------------------------------

// tf32 operands, of which the instruction reads the upper 19 bits.
struct Split {
  uint32_t high, low;
};
// How an operand is split: 16 bits are their own high part, and `low` is not used.
struct Splitter {
  uint32_t half, mask;  // of the last bit of the high part; what is kept

  __device__ explicit Splitter(qm_dtype dtype)
      : half(dtype == QM_F32 ? 0x1000u : 0u), mask(dtype == QM_F32 ? 0xFFFFE000u : ~0u) {}
  __device__ bool splits() const { return half != 0; }
  // To nearest. What is not finite leaves a NaN in `low`, whatever becomes of it in `high`.
  __device__ Split operator()(float value) const {
    const uint32_t high = (__float_as_uint(value) + half) & mask;
    return {high, __float_as_uint(value - __uint_as_float(high))};
  }
};

__device__ inline void Mma(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

constexpr int kWarpRows = 2, kWarpColumns = 2;  // tiles of 16 by 8 per warp

// Fragments of mma.m16n8k8: of a, (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); of b, (t, g),
// (t + 4, g), for lane 4 g + t.
template <bool kAlongDepth, int kTiles, int kRegisters>
__device__ inline void LoadFragments(const float* tile, int first, int depth,
                                     const Splitter& splitter, uint32_t (&high)[kTiles][kRegisters],
                                     uint32_t (&low)[kTiles][kRegisters]) {
  constexpr int kRows = kRegisters == 4 ? 16 : 8;
  const int g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int s = 0; s < kTiles; ++s) {
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) {
      const int i = first + s * kRows + g + (kRegisters == 4 ? r % 2 * 8 : 0);
      const int d = depth + t + (kRegisters == 4 ? r / 2 : r) * 4;
      const Split split = splitter(tile[Layout<kAlongDepth>::At(i, d)]);
      high[s][r] = split.high;
      low[s][r] = split.low;
    }
  }
}

template <bool kADepth, bool kBDepth>
__device__ inline void AddTile(const float* a_tile, const float* b_tile, int row, int column,
                               const Splitter& a_splitter, const Splitter& b_splitter,
                               float (&sum)[kWarpRows][kWarpColumns][4]) {
#pragma unroll
  for (int d = 0; d < kDepth; d += 8) {
    uint32_t a_high[kWarpRows][4], a_low[kWarpRows][4];
    uint32_t b_high[kWarpColumns][2], b_low[kWarpColumns][2];
    LoadFragments<kADepth>(a_tile, row, d, a_splitter, a_high, a_low);
    LoadFragments<kBDepth>(b_tile, column, d, b_splitter, b_high, b_low);
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpColumns; ++j) {
        if (a_splitter.splits()) Mma(a_low[i], b_high[j], sum[i][j]);
        if (b_splitter.splits()) Mma(a_high[i], b_low[j], sum[i][j]);
        Mma(a_high[i], b_high[j], sum[i][j]);
      }
    }
  }
}

// kADepth, kBDepth: whether k is the axis of stride 1 of the operand.
template <bool kADepth, bool kBDepth>
__global__ void __launch_bounds__(kThreads, 2) lora_product_kernel2(Arguments arguments) {
  __shared__ __align__(16) float a_tiles[2][Layout<kADepth>::kFloats];
  __shared__ __align__(16) float b_tiles[2][Layout<kBDepth>::kFloats];
  const Product& p = arguments.p;
  const int64_t first_row = blockIdx.x / arguments.tiles_across * kTile;
  const int64_t first_column = blockIdx.x % arguments.tiles_across * kTile;
  const int64_t begin = blockIdx.y * arguments.slice;
  const int64_t end = min(p.k, begin + arguments.slice);
  const int64_t member = blockIdx.z;
  const Source<kADepth> a = {Advanced(p.a, member * arguments.batch.a_step),
                             p.a.dtype,
                             arguments.a_vectors,
                             kADepth ? p.a.row_stride : p.a.column_stride,
                             first_row,
                             p.m,
                             end};
  const Source<kBDepth> b = {Advanced(p.b, member * arguments.batch.b_step),
                             p.b.dtype,
                             arguments.b_vectors,
                             kBDepth ? p.b.column_stride : p.b.row_stride,
                             first_column,
                             p.n,
                             end};
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int row = warp / 4 * 16 * kWarpRows, column = warp % 4 * 8 * kWarpColumns;
  const Splitter a_splitter(p.a.dtype), b_splitter(p.b.dtype);

  float sum[kWarpRows][kWarpColumns][4] = {};
  uint4 a_held[kVectors], b_held[kVectors];
  a.Fetch(begin, a_held);
  b.Fetch(begin, b_held);
  int stage = 0;
  for (int64_t k = begin; k < end; k += kDepth, stage ^= 1) {
    a.Put(a_held, a_tiles[stage]);
    b.Put(b_held, b_tiles[stage]);
    __syncthreads();
    if (k + kDepth < end) {
      a.Fetch(k + kDepth, a_held);
      b.Fetch(k + kDepth, b_held);
    }
    AddTile<kADepth, kBDepth>(a_tiles[stage], b_tiles[stage], row, column, a_splitter, b_splitter,
                              sum);
  }

  const int64_t partial = (blockIdx.y * int64_t{gridDim.z} + member) * p.m * p.n;
  const int64_t c_first = member * arguments.batch.c_step;
#pragma unroll
  for (int i = 0; i < kWarpRows; ++i) {
#pragma unroll
    for (int j = 0; j < kWarpColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t to_row = first_row + row + i * 16 + lane / 4 + e / 2 * 8;
        const int64_t to_column = first_column + column + j * 8 + lane % 4 * 2 + e % 2;
        if (to_row >= p.m || to_column >= p.n) continue;
        if (arguments.partial != nullptr) {
          arguments.partial[partial + to_row * p.n + to_column] = sum[i][j][e];
        } else {
          StoreFloat(p, c_first + to_row * arguments.batch.c_stride + to_column, sum[i][j][e]);
        }
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    lora_join_kernel1(Product p, const float* partial, int slices) {
  const int64_t count = p.m * p.n;
  const int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (at >= count) return;
  float sum = 0.0f;
  for (int s = 0; s < slices; ++s) sum += partial[s * count + at];
  StoreFloat(p, at, sum);
}

// The other stride and the step keep vectors aligned; tiles and slices begin at multiples of four.
bool ReadsVectors(const Operand& operand, int64_t step) {
  const int64_t stride = std::max(operand.row_stride, operand.column_stride);
  const uintptr_t bytes = operand.dtype == QM_F32 ? 16 : 8;
  return stride % 4 == 0 && step % 4 == 0 && reinterpret_cast<uintptr_t>(operand.data) % bytes == 0;
}

int64_t Tiles(int64_t extent) { return (extent + kTile - 1) / kTile; }
// Of one of `slices` parts of k, in whole steps.
int64_t SliceDepth(int64_t k, int64_t slices) {
  return ((k + slices - 1) / slices + kDepth - 1) / kDepth * kDepth;
}

auto KernelFor(const Product& p) {
  const bool a = p.a.column_stride == 1, b = p.b.row_stride == 1;
  if (a) return b ? lora_product_kernel2<true, true> : lora_product_kernel2<true, false>;
  return b ? lora_product_kernel2<false, true> : lora_product_kernel2<false, false>;
}

}  // namespace

int64_t ProductSlices(const Product& p, int64_t batch) {
  const int64_t tiles = Tiles(p.m) * Tiles(p.n) * batch;
  const int64_t wanted =
      std::clamp<int64_t>(kFullGrid / tiles, 1, (p.k + kLeastSlice - 1) / kLeastSlice);
  const int64_t slice = SliceDepth(p.k, wanted);
  return std::max<int64_t>((p.k + slice - 1) / slice, 1);
}

qm_status MultiplyBatchCuda(qm_call* call, const Product& p, const Batch& batch, int64_t slices,
                            float* partial) {
  const Arguments arguments = {p,
                               batch,
                               Tiles(p.n),
                               SliceDepth(p.k, slices),
                               ReadsVectors(p.a, batch.a_step),
                               ReadsVectors(p.b, batch.b_step),
                               partial};
  const dim3 grid(static_cast<unsigned>(Tiles(p.m) * Tiles(p.n)), static_cast<unsigned>(slices),
                  static_cast<unsigned>(batch.count));
  KernelFor(p)<<<grid, kThreads, 0, qm::Stream(call)>>>(arguments);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

// tiles * slices <= kFullGrid wherever there is more than one slice.
int64_t ProductScratchCuda() { return kFullGrid * kTile * kTile; }

qm_status MultiplyCuda(qm_call* call, const Product& p, float* scratch) {
  const int64_t slices = ProductSlices(p, 1);
  const Batch one = {.c_stride = p.n};
  QM_TRY(MultiplyBatchCuda(call, p, one, slices, slices > 1 ? scratch : nullptr));
  if (slices == 1) return QM_OK;
  const auto blocks = static_cast<unsigned>((p.m * p.n + kThreads - 1) / kThreads);
  lora_join_kernel1<<<blocks, kThreads, 0, qm::Stream(call)>>>(p, scratch,
                                                               static_cast<int>(slices));
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

}  // namespace quantmill::oftq
