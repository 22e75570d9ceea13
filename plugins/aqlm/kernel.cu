// Packed to dense, and y = x W^T for up to 16 rows, on the GPU.
//
//   y[r, o] = scale[o] * sum over groups j of <x[r, j], sum over m of C_m[index[o, j, m]]>
//   x [rows, in], y [rows, out], codes [out, in / d, M]: any alignment of rows but where said
//
// 1. PlainKernel: any parameters and dtype, up to 8 rows, a block per output; reference of 2.
// 2. TileKernel: d = 8, M x B of 2x8, 1x8 or 1x16, f16 or bf16 codebooks and x, in a multiple
// of 64. A warp holds 16 outputs and multiplies on tensor cores (m16n8k16); a thread's part of the
//    weight fragments is whole vectors of a codebook:
//
//      lane = 4 g + t holds of output g the groups 8 s + 2 t and 8 s + 2 t + 1, s = 0 .. 3, of a
//      chunk of 32 groups
//      product (s, e) of the chunk takes group 8 s + 2 t + e of each t: 32 columns as two k16
//      steps. Which columns share a step does not matter as long as x is read in the same order;
//      this way the lanes of a quad read one line of 128 bytes of x.
//
//    W is the first operand, so that up to eight rows of x cost one instruction. Codebooks of 256
//    vectors lie eight times in shared memory, copy i for lanes with lane % 8 = i: eight lanes read
//    16 bytes each from eight different groups of banks. The copies of vector v of both codebooks
//    share 256 bytes, so that one byte permutation puts an address together. Reading them is what
//    bounds the speed: 16 bytes of shared memory per byte of codes, 8 bytes of codes per cycle and
//    multiprocessor. The codebook of 1x16 (1 MB) is read through the caches.
//    Warps of a block split the columns, with the codes of their next chunk under way; their sums
//    are joined in order.
//    Measured with 2x8, 4096 x 28672 (H200, 2026-11-30): 39.3 us at 1 row, 55.6 at 16; before x was
//    read by the line and W came first 45.1 and 150.4.
// CPU reference: kernel_cpu.cc. Tests: aqlm_cuda_test.cc.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "codebook_format.h"
#include "quantmill/sdk/cuda.hpp"
#include "quantmill/sdk/mma.cuh"

namespace quantmill::aqlm {
namespace {

constexpr int kThreads = 256;

template <class T>
__device__ inline T FromFloat(float value);
template <>
__device__ inline float FromFloat<float>(float value) {
  return value;
}
template <>
__device__ inline __half FromFloat<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 FromFloat<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
__device__ inline float AsFloat(float value) { return value; }
__device__ inline float AsFloat(__half value) { return __half2float(value); }
__device__ inline float AsFloat(__nv_bfloat16 value) { return __bfloat162float(value); }

// Element a of the sum of the vectors of group (row, j), unscaled.
__device__ inline float SumOfVectors(const Weight& w, int64_t group, int a) {
  const Params& p = w.params;
  float sum = 0.0f;
  for (int m = 0; m < p.codebooks; ++m) {
    const int64_t vector = static_cast<int64_t>(m) * p.length() +
                           LoadIndex(w.codes, p.index_bits, group * p.codebooks + m);
    sum += LoadValue(w.codebooks, w.codebook_dtype, vector * p.group_size + a);
  }
  return sum;
}

// out [out, in]. One thread per element: neighbours read one vector and write side by side.
template <class T>
__global__ void __launch_bounds__(kThreads) DequantizeKernel(Weight w, T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= w.out * w.in) return;
  const int64_t group = i / w.params.group_size;
  const float scale = LoadValue(w.scales, w.scale_dtype, i / w.in);
  out[i] = FromFloat<T>(scale * SumOfVectors(w, group, static_cast<int>(i % w.params.group_size)));
}

constexpr int kPlainThreads = 128;

template <class T>
__global__ void __launch_bounds__(kPlainThreads) PlainKernel(Weight w, const T* x, int rows, T* y) {
  const int64_t o = blockIdx.x;
  float sums[kCudaPlainMaxRows] = {};
  for (int64_t k = threadIdx.x; k < w.in; k += kPlainThreads) {
    const int64_t group = o * w.groups() + k / w.params.group_size;
    const float value = SumOfVectors(w, group, static_cast<int>(k % w.params.group_size));
#pragma unroll
    for (int r = 0; r < kCudaPlainMaxRows; ++r) {
      if (r < rows) sums[r] += value * AsFloat(x[r * w.in + k]);
    }
  }
  __shared__ float shared[kPlainThreads];
  const float scale = LoadValue(w.scales, w.scale_dtype, o);
#pragma unroll
  for (int r = 0; r < kCudaPlainMaxRows; ++r) {
    if (r >= rows) break;  // uniform over the block
    shared[threadIdx.x] = sums[r];
    __syncthreads();
    for (int width = kPlainThreads / 2; width > 0; width /= 2) {
      if (threadIdx.x < width) shared[threadIdx.x] += shared[threadIdx.x + width];
      __syncthreads();
    }
    if (threadIdx.x == 0) y[r * w.out + o] = FromFloat<T>(scale * shared[0]);
    __syncthreads();
  }
}

// ---- tensor cores -------------------------------------------------------------------------------
constexpr int kWarps = 8;
constexpr int kTileOutputs = 16;  // of a block: two fragments of 8
constexpr int kFragments = kTileOutputs / 8;
constexpr int kTileRows = 16;
constexpr int kSteps = 4, kStepGroups = 8;  // two groups of a step per lane of a quad
constexpr int kChunkGroups = kSteps * kStepGroups;
constexpr int kCopies = 8;

constexpr int kVectorBytes = 256;  // in shared memory: of one index, eight copies per codebook

enum class Scheme { k2x8, k1x8, k1x16 };

template <Scheme S>
constexpr int kCodebookBytes = S == Scheme::k1x16 ? 0 : 256 * kVectorBytes;
template <Scheme S>
constexpr int kSharedBytes = kCodebookBytes<S> + kWarps* kTileOutputs* kTileRows * 4;

__device__ inline __half2 AsHalf2(uint32_t bits) {
  return *reinterpret_cast<const __half2*>(&bits);
}
__device__ inline __nv_bfloat162 AsBf162(uint32_t bits) {
  return *reinterpret_cast<const __nv_bfloat162*>(&bits);
}
// Two values of a codebook of type C.
__device__ inline float2 AsFloats(uint32_t bits, __half) { return __half22float2(AsHalf2(bits)); }
__device__ inline float2 AsFloats(uint32_t bits, __nv_bfloat16) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000u));
}
template <class Pair>
__device__ inline uint32_t Bits(Pair pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ inline uint32_t Rounded(float2 pair, __half) {
  return Bits(__floats2half2_rn(pair.x, pair.y));
}
__device__ inline uint32_t Rounded(float2 pair, __nv_bfloat16) {
  return Bits(__floats2bfloat162_rn(pair.x, pair.y));
}

// Two weights as the type T of x: the sum of one pair of each codebook, or the pair of the only
// one.
template <class C, class T>
__device__ inline uint32_t SumPair(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<C, __half> && std::is_same_v<T, __half>) {
    return Bits(__hadd2(AsHalf2(a), AsHalf2(b)));
  }
  if constexpr (std::is_same_v<C, __nv_bfloat16> && std::is_same_v<T, __nv_bfloat16>) {
    return Bits(__hadd2(AsBf162(a), AsBf162(b)));
  }
  const float2 x = AsFloats(a, C()), y = AsFloats(b, C());
  return Rounded(make_float2(x.x + y.x, x.y + y.y), T());
}
template <class C, class T>
__device__ inline uint32_t OnePair(uint32_t a) {
  if constexpr (std::is_same_v<C, T>) return a;
  return Rounded(AsFloats(a, C()), T());
}

// The eight weights of group e (0 or 1) of the lane's codes of a step. `copy_bytes`: where the
// lane's copy lies among the eight.
template <Scheme S, class C, class T>
__device__ inline uint4 Decode(uint32_t codes, int e, const unsigned char* shared,
                               uint32_t copy_bytes, const uint4* __restrict__ codebook) {
  uint4 out;
  if constexpr (S == Scheme::k2x8) {
    const auto vector = [&](uint32_t m) {
      const uint32_t at = __byte_perm(codes, copy_bytes, 0x7704 | (2 * e + m) << 4);
      return *reinterpret_cast<const uint4*>(shared + at + m * (kVectorBytes / 2));
    };
    const uint4 a = vector(0), b = vector(1);
    out.x = SumPair<C, T>(a.x, b.x);
    out.y = SumPair<C, T>(a.y, b.y);
    out.z = SumPair<C, T>(a.z, b.z);
    out.w = SumPair<C, T>(a.w, b.w);
    return out;
  }
  uint4 a;
  if constexpr (S == Scheme::k1x8) {
    const uint32_t at = __byte_perm(codes, copy_bytes, 0x7704 | e << 4);
    a = *reinterpret_cast<const uint4*>(shared + at);
  } else {
    a = __ldg(codebook + ((codes >> (e * 16)) & 0xFFFFu));
  }
  out.x = OnePair<C, T>(a.x);
  out.y = OnePair<C, T>(a.y);
  out.z = OnePair<C, T>(a.z);
  out.w = OnePair<C, T>(a.w);
  return out;
}

// The codes of two groups.
template <Scheme S>
__device__ inline uint32_t LoadTwoCodes(const char* codes) {
  if constexpr (S == Scheme::k1x8) return __ldg(reinterpret_cast<const uint16_t*>(codes));
  return __ldg(reinterpret_cast<const uint32_t*>(codes));
}

// A lane's codes of a chunk of kFragments times 8 outputs.
struct HeldCodes {
  uint32_t codes[kSteps][kFragments];
};

// Reads a warp's chunks of one tile after the other.
template <Scheme S>
class CodeReader {
 public:
  __device__ CodeReader(const Weight& w, int warp, int lane)
      : codes_(static_cast<const char*>(w.codes)),
        out_(w.out),
        groups_(w.groups()),
        warp_(warp),
        lane_(lane) {}

  // Goes to the warp's first chunk of a tile. Outputs beyond the last are the last one again, and
  // their results are dropped.
  __device__ void Start(int64_t tile) {
    steps_left_ = static_cast<int>(groups_ / kStepGroups) - warp_ * kSteps;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const int64_t o = min(tile * kTileOutputs + f * 8 + lane_ / 4, out_ - 1);
      at_[f] = codes_ + (o * groups_ + warp_ * kChunkGroups + lane_ % 4 * 2) * kCodeBytes;
    }
  }

  // The next one; steps beyond the last are not read.
  __device__ void Next(HeldCodes* held) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s >= steps_left_) break;  // the same in the whole warp
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        held->codes[s][f] = LoadTwoCodes<S>(at_[f] + s * kStepGroups * kCodeBytes);
      }
    }
    steps_left_ -= kWarps * kSteps;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) at_[f] += kWarps * kChunkGroups * kCodeBytes;
  }

 private:
  static constexpr int kCodeBytes = S == Scheme::k1x8 ? 1 : 2;  // of a group

  const char* const codes_;
  const int64_t out_, groups_;
  const int warp_, lane_;
  int steps_left_ = 0;
  const char* at_[kFragments];
};

// Copies of the codebooks to shared memory.
template <Scheme S>
__device__ inline void FillCodebooks(const uint4* codebook, unsigned char* shared) {
  constexpr int kCodebooks = S == Scheme::k2x8 ? 2 : 1;
  for (int i = threadIdx.x; i < 256 * kCodebooks * kCopies; i += kWarps * 32) {
    const int vector = i / kCopies, at = vector % 256 * kVectorBytes + vector / 256 * 128;
    *reinterpret_cast<uint4*>(shared + at + i % kCopies * 16) = __ldg(codebook + vector);
  }
}

// Blocks walk over tiles of 16 outputs. kColumns: tiles of 8 rows of x.
template <Scheme S, class C, class T, int kColumns>
__global__ void __launch_bounds__(kWarps * 32)
    TileKernel(Weight w, const T* __restrict__ x, int rows, T* y) {
  extern __shared__ __align__(16) unsigned char shared[];
  float* partial = reinterpret_cast<float*>(shared + kCodebookBytes<S>);
  const uint4* codebook = static_cast<const uint4*>(w.codebooks);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t groups = w.groups();
  const int steps = static_cast<int>(groups / kStepGroups);
  const int64_t tiles = (w.out + kTileOutputs - 1) / kTileOutputs;
  CodeReader<S> reader(w, warp, lane);
  HeldCodes next;
  reader.Start(blockIdx.x);
  reader.Next(&next);
  if constexpr (S != Scheme::k1x16) FillCodebooks<S>(codebook, shared);
  __syncthreads();

  const auto copy_bytes = static_cast<uint32_t>(lane % kCopies * 16);
  const uint4* lane_x[kColumns];
  bool there[kColumns];  // lanes whose row is not there keep zeros
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int row = c * 8 + g;
    there[c] = row < rows;
    lane_x[c] = reinterpret_cast<const uint4*>(x) + row * groups + warp * kChunkGroups + t * 2;
  }
  uint4 held_x[2][kColumns] = {};
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float sums[kColumns][4] = {};
    const uint4* x_at[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) x_at[c] = lane_x[c];
    for (int first = 0; first < steps; first += kWarps * kSteps) {
      const HeldCodes held = next;
      if (first + kWarps * kSteps >= steps) reader.Start(min(tile + gridDim.x, tiles - 1));
      reader.Next(&next);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (first + warp * kSteps + s >= steps) break;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            if (there[c]) held_x[e][c] = __ldg(x_at[c] + s * kStepGroups + e);
          }
          const uint4 a = Decode<S, C, T>(held.codes[s][0], e, shared, copy_bytes, codebook);
          const uint4 b = Decode<S, C, T>(held.codes[s][1], e, shared, copy_bytes, codebook);
          const uint32_t first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            qm::Mma16816(first, held_x[e][c].x, held_x[e][c].y, sums[c], T());
            qm::Mma16816(second, held_x[e][c].z, held_x[e][c].w, sums[c], T());
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) x_at[c] += kWarps * kChunkGroups;
    }
    // partial[warp][row][output]; element i of lane 4 g + t: output g + 8 (i / 2), row 2 t + i % 2.
    float* own = partial + warp * kTileRows * kTileOutputs;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        own[(c * 8 + t * 2 + i % 2) * kTileOutputs + g + i / 2 * 8] = sums[c][i];
      }
    }
    __syncthreads();
    static_assert(kWarps * 32 == kTileRows * kTileOutputs, "one sum per thread");
    const int row = threadIdx.x / kTileOutputs;
    const int64_t o = tile * kTileOutputs + threadIdx.x % kTileOutputs;
    if (row < rows && o < w.out) {
      float sum = 0.0f;
#pragma unroll
      for (int s = 0; s < kWarps; ++s) sum += partial[s * kTileRows * kTileOutputs + threadIdx.x];
      y[row * w.out + o] = FromFloat<T>(LoadValue(w.scales, w.scale_dtype, o) * sum);
    }
    __syncthreads();
  }
}

template <Scheme S, class C, class T, int kColumns>
qm_status LaunchTiles(qm_call* call, const Weight& w, const T* x, int rows, T* y) {
  constexpr int kBytes = kSharedBytes<S>;
  QM_CUDA(call, cudaFuncSetAttribute(TileKernel<S, C, T, kColumns>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  int processors = 0;
  QM_CUDA(call,
          cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, call->device.index));
  // As many blocks as fit beside one another: 72 KB each with 2x8, of 100 KB on sm_89.
  int per_processor = 0;
  QM_CUDA(call, cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                    &per_processor, TileKernel<S, C, T, kColumns>, kWarps * 32, kBytes));
  const int64_t tiles = (w.out + kTileOutputs - 1) / kTileOutputs;
  const int64_t blocks = std::min<int64_t>(tiles, int64_t{processors} * std::max(1, per_processor));
  TileKernel<S, C, T, kColumns>
      <<<static_cast<unsigned>(blocks), kWarps * 32, kBytes, qm::Stream(call)>>>(w, x, rows, y);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

template <Scheme S, class C, class T>
qm_status RunTiles(qm_call* call, const Weight& w, const qm_tensor& x, qm_tensor* y) {
  const int rows = static_cast<int>(x.shape[0]);
  const T* from = static_cast<const T*>(x.data);
  T* to = static_cast<T*>(y->data);
  return rows <= 8 ? LaunchTiles<S, C, T, 1>(call, w, from, rows, to)
                   : LaunchTiles<S, C, T, 2>(call, w, from, rows, to);
}

bool Aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool TilesFit(const Weight& w, const qm_tensor& x) {
  const Params& p = w.params;
  const bool scheme = (p.codebooks == 2 && p.index_bits == 8) ||
                      (p.codebooks == 1 && (p.index_bits == 8 || p.index_bits == 16));
  return scheme && p.group_size == 8 && w.in % 64 == 0 && w.codebook_dtype != QM_F32 &&
         x.dtype != QM_F32 && x.shape[0] <= kCudaMaxRows && Aligned(x.data) && Aligned(w.codes) &&
         Aligned(w.codebooks);
}

template <class C, class T>
qm_status RunScheme(qm_call* call, const Weight& w, const qm_tensor& x, qm_tensor* y) {
  if (w.params.codebooks == 2) return RunTiles<Scheme::k2x8, C, T>(call, w, x, y);
  if (w.params.index_bits == 8) return RunTiles<Scheme::k1x8, C, T>(call, w, x, y);
  return RunTiles<Scheme::k1x16, C, T>(call, w, x, y);
}

template <class T>
qm_status RunAnyTiles(qm_call* call, const Weight& w, const qm_tensor& x, qm_tensor* y) {
  return w.codebook_dtype == QM_F16 ? RunScheme<__half, T>(call, w, x, y)
                                    : RunScheme<__nv_bfloat16, T>(call, w, x, y);
}

template <class T>
qm_status RunPlain(qm_call* call, const Weight& w, const qm_tensor& x, qm_tensor* y) {
  PlainKernel<<<static_cast<unsigned>(w.out), kPlainThreads, 0, qm::Stream(call)>>>(
      w, static_cast<const T*>(x.data), static_cast<int>(x.shape[0]), static_cast<T*>(y->data));
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

template <class T>
qm_status RunDequantize(qm_call* call, const Weight& w, qm_tensor* out) {
  const int64_t blocks = (w.out * w.in + kThreads - 1) / kThreads;
  DequantizeKernel<<<static_cast<unsigned>(blocks), kThreads, 0, qm::Stream(call)>>>(
      w, static_cast<T*>(out->data));
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

}  // namespace

qm_status CudaDequantize(qm_call* call, const Weight& w, qm_tensor* out) {
  if (out->dtype == QM_F32) return RunDequantize<float>(call, w, out);
  if (out->dtype == QM_F16) return RunDequantize<__half>(call, w, out);
  return RunDequantize<__nv_bfloat16>(call, w, out);
}

qm_status CudaMatmul(qm_call* call, const Weight& w, const qm_tensor& x, qm_tensor* y) {
  if (TilesFit(w, x)) {
    return x.dtype == QM_F16 ? RunAnyTiles<__half>(call, w, x, y)
                             : RunAnyTiles<__nv_bfloat16>(call, w, x, y);
  }
  if (x.shape[0] > kCudaPlainMaxRows) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "products with this packed weight are served for up ",
                    "to ", kCudaPlainMaxRows, " rows here");
  }
  if (x.dtype == QM_F32) return RunPlain<float>(call, w, x, y);
  if (x.dtype == QM_F16) return RunPlain<__half>(call, w, x, y);
  return RunPlain<__nv_bfloat16>(call, w, x, y);
}

}  // namespace quantmill::aqlm
