// y = x W^T with W in tiles (affine_tiles.h), for f16 and bf16 and many rows of x, on the tensor
// cores' path for groups of four warps (wgmma, sm_90a).
//
// W is the first operand, from registers: a warp decodes its strip of 16 outputs as for
// mma.m16n8k16, so that the tiles serve both. x^T is the second, from shared memory. Operands are
// code - zero point, exact where the zero point is an integer and otherwise rounded once to T, as a
// dense weight in T would be; sums are f32, and the scale enters once per group:
//   y = sum over groups of scale * sum (code - zero) x.
//
//   grid and cluster as in affine_tile_kernel.cuh; block: WideShape, with one ring of stages.
#ifndef QUANTMILL_PLUGINS_AFFINE_AFFINE_WIDE_KERNEL_CUH_
#define QUANTMILL_PLUGINS_AFFINE_AFFINE_WIDE_KERNEL_CUH_

#include "affine_tile_kernel.cuh"
#include "affine_wgmma.cuh"

namespace affine {

// From base + step * code (affine_tile_decode.cuh) to (code - zero) * kUnitValue, pairwise.
template <class T>
struct Shifter;
template <>
struct Shifter<__half> {
  // Subnormal operands are scaled up before something that is no integer is subtracted.
  static constexpr float kUnitValue = 0x1p-12f;
  static __device__ inline uint32_t Run(uint32_t pair, float, float step, __half2 minus_zero) {
    const __half2 factor = __float2half2_rn(kUnitValue / step);
    const __half2 result = __hfma2(*reinterpret_cast<const __half2*>(&pair), factor, minus_zero);
    return *reinterpret_cast<const uint32_t*>(&result);
  }
  static __device__ inline __half2 Pair(float value) { return __float2half2_rn(value); }
};
template <>
struct Shifter<__nv_bfloat16> {
  static constexpr float kUnitValue = 1;
  static __device__ inline uint32_t Run(uint32_t pair, float base, float step,
                                        __nv_bfloat162 minus_zero) {
    const __nv_bfloat162 code =  // exact
        __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&pair), __float2bfloat162_rn(base));
    const __nv_bfloat162 result = __hfma2(code, __float2bfloat162_rn(1 / step), minus_zero);
    return *reinterpret_cast<const uint32_t*>(&result);
  }
  static __device__ inline __nv_bfloat162 Pair(float value) { return __float2bfloat162_rn(value); }
};

// Copies of x to the ring, behind the part of W: two halves of 64 channels, each rows of 128 bytes
// as DescribeRows says.
template <class T, int kTileBits, class Shape>
class WideRowLoader {
 public:
  __device__ WideRowLoader(const DeviceWeight& w, const TilePlan& plan, uint32_t ring, const T* x,
                           int rows, int thread, int begin)
      : stage_(ring, plan.stage_bytes, Shape::kStages),
        row_step_(w.in * kRowStep),
        units_(plan.units),
        unit_(begin * kChunkUnits) {
    const int row = thread / 16, piece = thread % 16;
    x_ = Keep(x + row * w.in + piece * 8);
    target_ = Keep(Shape::kTileStrips * kChunkUnits * UnitWords(kTileBits) * 4 +
                   (piece / 8 * Shape::kTileRows + row) * 128 + (piece % 8 ^ row % 8) * 16);
    rows_left_ = Keep(rows - row);
    first_unit_ = Keep(piece / 4);
  }

  // Starts the copies of the next chunk.
  __device__ void Next() {
    const uint32_t target = stage_.at() + target_;
    const T* source = x_ + static_cast<int64_t>(unit_) * kUnit;
    if (unit_ + first_unit_ < units_) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (i * kRowStep >= rows_left_) break;
        CopyAsyncCached(target + i * kRowStep * 128, source);
        source += row_step_;
      }
    }
    stage_.Next();
    unit_ += kChunkUnits;
  }

 private:
  static constexpr int kRowStep = Shape::kThreads / 16;
  static_assert(kRowStep % 8 == 0, "rows of a thread share their swizzle");
  static constexpr int kCopies = (Shape::kTileRows + kRowStep - 1) / kRowStep;

  Place stage_;
  const T* x_;
  const int64_t row_step_;
  const int units_;
  int target_, rows_left_, first_unit_;
  int unit_;  // the next one
};

// The sums of a thread. Groups begin at multiples of kStep units.
template <class T, int kTileBits, class Shape, int kStep>
class WideSums {
 public:
  static constexpr int kUnitBytes = UnitWords(kTileBits) * 4;
  static constexpr int kChunkBytes = kChunkUnits * kUnitBytes;
  static constexpr int kValues = Shape::kTileRows / 2;
  using Decode = Decoder<T, kTileBits>;

  float sum[kValues] = {};  // finished groups

  __device__ WideSums(const DeviceWeight& w, const TilePlan& plan, uint32_t ring, int warp,
                      int lane, int begin)
      : plan_(plan),
        stage_(ring, plan.stage_bytes, Shape::kStages),
        slot_(
            ring + Shape::kStages * plan.stage_bytes + warp * (plan.scale_bytes + plan.zero_bytes),
            plan.group_bytes, plan.group_slots),
        lane_(Keep(lane)),
        tiles_(Keep(warp * kChunkBytes)),
        scale_dtype_(w.scale_dtype),
        zero_dtype_(w.zero_dtype),
        middle_(static_cast<float>(1 << (w.bits - 1))),
        unit_(begin * kChunkUnits),
        units_left_(plan.group_units - unit_ % plan.group_units) {}

  // The next chunk, which is in the ring.
  __device__ void AddChunk() {
    const uint32_t tiles = stage_.at() + tiles_;
    const uint32_t x = stage_.at() + Shape::kTileStrips * kChunkBytes;
    stage_.Next();
#pragma unroll
    for (int i = 0; i < kChunkUnits; i += kStep) {
      if (kStep == kChunkUnits || unit_ + i < plan_.units) {
        if (accumulate_ == 0) StartGroup();
#pragma unroll
        for (int k = i; k < i + kStep; ++k) AddUnit(tiles + k * kUnitBytes, x, k);
        units_left_ -= kStep;
        if (units_left_ == 0) FinishGroup();
      }
    }
    WaitProducts();  // before the stage is filled again
    unit_ += kChunkUnits;
  }

  // After the last chunk: what is left of a group that other blocks go on with.
  __device__ void Finish() {
    if (accumulate_ != 0) FinishGroup();
  }

 private:
  __device__ void AddUnit(uint32_t tiles, uint32_t x, int k) {
    uint32_t q[Decode::kWords], a[2][4];
    Decode::Load(tiles, lane_, q);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      Decode::Run(q, j, a[j]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[j][i] =
            Shifter<T>::Run(a[j][i], Decode::Base(i % 2), Decode::Step(i % 2), minus_zero_[i % 2]);
        asm volatile("" : "+r"(a[j][i])::"memory");  // before the fence
      }
    }
    FenceProducts();
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t rows = x + k / 2 * Shape::kTileRows * 128 + (k % 2 * 2 + j) * 32;
      WideProduct<T, Shape::kTileRows>::Run(a[j], DescribeRows(rows), accumulate_, part_);
      accumulate_ = 1;
    }
    CommitProducts();
  }

  __device__ void StartGroup() {
    float scale[1][2], zero[1][2] = {{middle_, middle_}};
    LoadRows<1>(slot_.at(), 0, lane_ / 4, scale_dtype_, scale);
    if (plan_.zero_bytes != 0) {
      LoadRows<1>(slot_.at() + plan_.scale_bytes, 0, lane_ / 4, zero_dtype_, zero);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      factor_[half] = scale[0][half] / Shifter<T>::kUnitValue;
      minus_zero_[half] = Shifter<T>::Pair(-zero[0][half] * Shifter<T>::kUnitValue);
    }
    slot_.Next();
  }

  __device__ void FinishGroup() {
    WaitProducts();
#pragma unroll
    for (int i = 0; i < kValues; ++i) sum[i] += factor_[i / 2 % 2] * part_[i];
    accumulate_ = 0;
    units_left_ = plan_.group_units;
  }

  const TilePlan& plan_;
  Place stage_, slot_;
  const int lane_, tiles_;
  const qm_dtype scale_dtype_, zero_dtype_;
  const float middle_;
  int unit_;
  int units_left_;      // of the group at hand
  int accumulate_ = 0;  // 0: the group at hand has no products yet
  float factor_[2];
  decltype(Shifter<T>::Pair(0.0f)) minus_zero_[2];
  float part_[kValues] = {};  // the group at hand, unscaled
};

// x: [m, in], y: [m, out]. Dynamic shared memory: plan.shared_bytes. Two blocks to a multiprocessor
// where the sums leave registers for that.
template <class T, int kTileBits, class Shape, int kStep>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kTileRows < 128 ? 2 : 1)
    WideKernel(const __grid_constant__ DeviceWeight w, const __grid_constant__ TilePlan plan,
               const T* x, int64_t m, T* y) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // not launched on others
  extern __shared__ __align__(1024) unsigned char wide_shared[];
  LetNextStart();
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * Shape::kTileRows;
  const int rows = static_cast<int>(min(m - first_row, static_cast<int64_t>(Shape::kTileRows)));
  const int64_t first_strip = static_cast<int64_t>(blockIdx.z) * Shape::kTileStrips;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const uint32_t ring = Keep(static_cast<uint32_t>(__cvta_generic_to_shared(wide_shared)));

  const auto chunks = static_cast<unsigned>(w.chunks);
  const int begin = static_cast<int>(chunks * blockIdx.y / gridDim.y);
  const int end = static_cast<int>(chunks * (blockIdx.y + 1) / gridDim.y);
  WideSums<T, kTileBits, Shape, kStep> sums(w, plan, ring, warp, lane, begin);
  TileLoader<kTileBits, Shape> tiles(w, plan, ring, first_strip, thread, begin);
  WideRowLoader<T, kTileBits, Shape> x_rows(w, plan, ring, x + first_row * w.in, rows, thread,
                                            begin);
  StartCopies<Shape>(tiles, x_rows, begin, end);
#pragma unroll 1
  for (int chunk = begin; chunk < end; ++chunk) {
    WaitCopies<Shape::kStages - 2>();
    FenceShared();
    __syncthreads();  // all copies are there; the stage to fill next has been used
    if (chunk + Shape::kStages - 1 < end) {
      tiles.Next();
      x_rows.Next();
    }
    CommitCopies();
    sums.AddChunk();
  }
  sums.Finish();
  WaitCopies<0>();
  __syncthreads();  // the ring is free

  constexpr int kPitch = Shape::kTileOut + kTilePad;
  float* partial = reinterpret_cast<float*>(wide_shared);
#pragma unroll
  for (int i = 0; i < sums.kValues; ++i) {
    const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row < rows)
      partial[row * kPitch + warp * kStripRows + lane / 4 + i / 2 % 2 * 8] = sums.sum[i];
  }
  __syncthreads();
  AddTeams<T, Shape>(partial, w.out, first_strip * kStripRows, rows, y + first_row * w.out);
#endif
}

}  // namespace affine

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_WIDE_KERNEL_CUH_
