// y = x W^T with W in tiles (affine_tiles.h), on tensor cores, for f16 and bf16.
//
// W is the first operand of mma.m16n8k16, x^T the second, so that up to eight rows of x cost one
// instruction per tile, and a single row wastes only tensor-core time, which is idle there. With
// operands base + step * code (affine_tile_decode.cuh) and sums in f32
//   y = sum over groups of scale / step * (sum operand x - (base + zero step) * sum x),
// where the sum of x comes from the same instruction with a first operand of ones. Nothing but x is
// rounded before the end.
//
//   grid: (tiles of rows of x, splits of the input channels, tiles of outputs). The splits of a
//     tile are a cluster and add up through distributed shared memory.
//   block: kDepthWarps teams, which split the input channels further. A team of kOutWarps x
//     kRowWarps warps copies its chunks of W, x, scales and zero points to a ring of kStages stages
//     ahead of use: the product is bound by memory, and what counts is bytes in flight.
//   warp: kStrips strips of 16 outputs by kRowTiles times 8 rows of x.
// All sums are added in a fixed order, so equal inputs give equal bytes.
#ifndef QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_KERNEL_CUH_
#define QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_KERNEL_CUH_

#include <cooperative_groups.h>

#include "affine_device.cuh"
#include "affine_tile_decode.cuh"
#include "affine_tile_memory.h"
#include "quantmill/sdk/mma.cuh"

namespace affine {

__device__ inline void CopyAsync(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
// Kept in the first-level cache, for blocks on the same multiprocessor.
__device__ inline void CopyAsyncCached(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ inline void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `kPending` of this thread's latest groups are under way.
template <int kPending>
__device__ inline void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// Programmatic dependent launch: a product may start while the kernel before it in the stream is
// still running, and fetch weights, which no kernel near it writes; it waits before it touches x or
// y. No-ops unless launched that way.
__device__ inline void LetNextStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void WaitForPrevious() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The value, in a way that the compiler cannot work out again: it would do so in every round of a
// loop rather than keep a register.
template <class V>
__device__ inline V Keep(V value) {
  return __shfl_sync(0xFFFFFFFFu, value, threadIdx.x % 32);
}
template <class V>
__device__ inline const V* Keep(const V* value) {
  return reinterpret_cast<const V*>(Keep(reinterpret_cast<unsigned long long>(value)));
}

// The team's threads meet; barrier 0 is that of the block.
template <class Shape>
__device__ inline void MeetTeam(int team) {
  if constexpr (Shape::kTeamWarps == 1) {
    __syncwarp();
  } else if constexpr (Shape::kDepthWarps == 1) {
    __syncthreads();
  } else {
#pragma unroll
    for (int i = 0; i < Shape::kDepthWarps; ++i) {  // with a constant fewer barriers are reserved
      if (i != team) continue;
      asm volatile("bar.sync %0, %1;" ::"r"(i + 1), "n"(Shape::kTeamThreads) : "memory");
    }
  }
}

// Where piece 0..3 of 16 bytes of a row of x lies in the row's 64: rows read together meet
// different banks.
__device__ constexpr int PieceOfRow(int row, int piece) { return piece ^ (row / 2 % 4); }

// Goes round equal places in shared memory.
class Place {
 public:
  __device__ Place(uint32_t first, int bytes, int count)
      : at_(first), first_(first), end_(first + bytes * count), bytes_(bytes) {}
  __device__ uint32_t at() const { return at_; }
  __device__ void Next() {
    at_ += bytes_;
    if (at_ == end_) at_ = first_;
  }

 private:
  uint32_t at_, first_, end_, bytes_;
};

// Values of rows g and g+8 of R strips, as f32.
template <int R>
__device__ inline void LoadRows(uint32_t address, int strip_bytes, int g, qm_dtype dtype,
                                float (&values)[R][2]) {
  const auto load = [&](auto one) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        values[r][half] = one(address + r * strip_bytes, g + 8 * half);
      }
    }
  };
  if (dtype == QM_BF16) {
    load([](uint32_t strip, int row) {
      return __uint_as_float(LoadShared16(strip + row * 2) << 16);
    });
  } else if (dtype == QM_F16) {
    load([](uint32_t strip, int row) {
      return __half2float(__ushort_as_half(static_cast<uint16_t>(LoadShared16(strip + row * 2))));
    });
  } else if (dtype == QM_U8) {
    load([](uint32_t strip, int row) { return static_cast<float>(LoadShared8(strip + row)); });
  } else {
    load([](uint32_t strip, int row) { return __uint_as_float(LoadShared32(strip + row * 4)); });
  }
}

// Copies of a team's part of W, and of its scales and zero points, to its ring; for one thread.
template <int kTileBits, class Shape>
class TileLoader {
 public:
  static constexpr int kChunkBytes = kChunkUnits * UnitWords(kTileBits) * 4;

  __device__ TileLoader(const DeviceWeight& w, const TilePlan& plan, uint32_t ring,
                        int64_t first_strip, int thread, int begin)
      : plan_(plan),
        stage_(ring, plan.stage_bytes, Shape::kStages),
        slot_(ring + Shape::kStages * plan.stage_bytes, plan.group_bytes, plan.group_slots),
        target_(Keep(thread * 16)),
        chunk_(begin) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int piece = thread + i * Shape::kTeamThreads;
      tiles_[i] = Keep(reinterpret_cast<const unsigned char*>(w.tiles) +
                       Strip(w, first_strip, piece / kPieces) * w.chunks * kChunkBytes +
                       piece % kPieces * 16);
    }
    // Eight threads per strip: up to four pieces of scales, up to four of zero points.
    const int group = begin * kChunkUnits / plan.group_units;
    const bool zero = thread % 8 >= 4;
    const int bytes = zero ? plan.zero_bytes : plan.scale_bytes;
    const int offset = thread % 4 * 16;
    copies_groups_ = Keep(thread < 8 * Shape::kTileStrips && offset < bytes ? 1 : 0);
    group_unit_ = group * plan.group_units;
    source_ = static_cast<const unsigned char*>(zero ? w.zero : w.scale) +
              (Strip(w, first_strip, thread / 8) * w.groups + group) * bytes + offset;
    group_target_ = Keep((thread / 8 * (plan.scale_bytes + plan.zero_bytes)) +
                         (zero ? plan.scale_bytes : 0) + offset);
    group_step_ = Keep(bytes);
  }

  // Starts the copies of the next chunk.
  __device__ void Next() {
    const uint32_t target = stage_.at() + target_;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      constexpr bool kWhole = kTilePieces % Shape::kTeamThreads == 0;
      if (kWhole || i + 1 < kCopies || target_ / 16 + i * Shape::kTeamThreads < kTilePieces) {
        CopyAsync(target + i * Shape::kTeamThreads * 16,
                  tiles_[i] + static_cast<int64_t>(chunk_) * kChunkBytes);
      }
    }
    stage_.Next();
    ++chunk_;
    const int end = min(chunk_ * kChunkUnits, plan_.units);
    for (; group_unit_ < end; group_unit_ += plan_.group_units) {
      if (copies_groups_ != 0) CopyAsync(slot_.at() + group_target_, source_);
      source_ += group_step_;
      slot_.Next();
    }
  }

 private:
  static constexpr int kPieces = kChunkBytes / 16;  // of a strip
  static constexpr int kTilePieces = Shape::kTileStrips * kPieces;
  static constexpr int kCopies = (kTilePieces + Shape::kTeamThreads - 1) / Shape::kTeamThreads;

  // A strip beyond the end repeats the last one; its results are dropped.
  static __device__ int64_t Strip(const DeviceWeight& w, int64_t first, int index) {
    const int64_t strip = first + min(index, Shape::kTileStrips - 1);
    return strip < w.strips ? strip : w.strips - 1;
  }

  const TilePlan& plan_;
  Place stage_, slot_;
  const unsigned char* tiles_[kCopies];  // of the first chunk of each strip
  const unsigned char* source_;          // scales or zero points
  int target_, group_target_, copies_groups_, group_step_;
  int chunk_;       // the next one
  int group_unit_;  // first unit of the next group to copy
};

// Copies of a team's part of x to its ring, behind the part of W; for one thread. Rows lie as
// [unit][row][64 bytes], their pieces of 16 bytes as PieceOfRow says.
template <class T, int kTileBits, class Shape>
class RowLoader {
 public:
  __device__ RowLoader(const DeviceWeight& w, const TilePlan& plan, uint32_t ring, const T* x,
                       int rows, int thread, int begin)
      : stage_(ring, plan.stage_bytes, Shape::kStages),
        row_step_(w.in * kRowStep),
        units_(plan.units),
        unit_(begin * kChunkUnits) {
    const int row = thread / kPiecesOfRow, unit = thread % kPiecesOfRow / 4;
    x_ = Keep(x + row * w.in + thread % kPiecesOfRow * 8);
    target_ = Keep(Shape::kTileStrips * kChunkUnits * UnitWords(kTileBits) * 4 +
                   (unit * plan.rows + row) * kUnitRowBytes + PieceOfRow(row, thread % 4) * 16);
    rows_left_ = Keep(rows - row);
    first_unit_ = Keep(unit);
  }

  // Starts the copies of the next chunk.
  __device__ void Next() {
    const uint32_t target = stage_.at() + target_;
    const T* source = x_ + static_cast<int64_t>(unit_) * kUnit;
    if (unit_ + first_unit_ < units_) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (i * kRowStep >= rows_left_) break;
        const uint32_t piece = PieceOfRow(i * kRowStep, 0) * 16;  // places are multiples of 64
        CopyAsyncCached((target + i * kRowStep * kUnitRowBytes) ^ piece, source);
        source += row_step_;
      }
    }
    stage_.Next();
    unit_ += kChunkUnits;
  }

 private:
  static constexpr int kPiecesOfRow = kChunkUnits * 4;
  static constexpr int kRowStep = Shape::kTeamThreads / kPiecesOfRow;
  static constexpr int kCopies = (Shape::kTileRows + kRowStep - 1) / kRowStep;

  Place stage_;
  const T* x_;
  const int64_t row_step_;
  const int units_;
  int target_, rows_left_, first_unit_;
  int unit_;  // the next one
};

// Fills the ring but for one stage: a group of copies per chunk, those of the weight in the first.
template <class Shape, class Tiles, class Rows>
__device__ inline void StartCopies(Tiles& tiles, Rows& rows, int begin, int end) {
#pragma unroll 1
  for (int chunk = begin; chunk < min(end, begin + Shape::kStages - 1); ++chunk) tiles.Next();
  WaitForPrevious();
#pragma unroll 1
  for (int chunk = begin; chunk < begin + Shape::kStages - 1; ++chunk) {
    if (chunk < end) rows.Next();
    CommitCopies();
  }
}

// The sums of a warp.
template <class T, int kTileBits, class Shape>
class TileSums {
 public:
  static constexpr int kUnitBytes = UnitWords(kTileBits) * 4;
  static constexpr int kChunkBytes = kChunkUnits * kUnitBytes;
  static constexpr int R = Shape::kStrips, N = Shape::kRowTiles;
  using Decode = Decoder<T, kTileBits>;

  float sum[R][N][4] = {};  // finished groups

  __device__ TileSums(const DeviceWeight& w, const TilePlan& plan, uint32_t ring, int warp,
                      int lane, int begin)
      : plan_(plan),
        stage_(ring, plan.stage_bytes, Shape::kStages),
        slot_(ring + Shape::kStages * plan.stage_bytes +
                  warp % Shape::kOutWarps * R * (plan.scale_bytes + plan.zero_bytes),
              plan.group_bytes, plan.group_slots),
        lane_(Keep(lane)),
        tiles_(Keep(warp % Shape::kOutWarps * R * kChunkBytes)),
        x_(Keep(Shape::kTileStrips * kChunkBytes +
                (warp / Shape::kOutWarps * N * 8 + lane % 8) * kUnitRowBytes +
                PieceOfRow(lane % 8, lane / 8) * 16)),
        scale_dtype_(w.scale_dtype),
        zero_dtype_(w.zero_dtype),
        middle_(static_cast<float>(1 << (w.bits - 1))),
        unit_(begin * kChunkUnits),
        units_left_(plan.group_units - unit_ % plan.group_units) {
#pragma unroll
    for (int i = 0; i < 4; ++i) ones_[i] = Keep(Numbers<T>::kOnes);
  }

  // The next chunk, which is in the ring.
  __device__ void AddChunk() {
    uint32_t tiles = stage_.at() + tiles_;
    uint32_t x = stage_.at() + x_;
    stage_.Next();
    const int end = min(unit_ + kChunkUnits, plan_.units);
#pragma unroll 1
    for (; unit_ < end; ++unit_) {
      AddUnit(tiles, x);
      tiles += kUnitBytes;
      x += plan_.rows * kUnitRowBytes;
      if (--units_left_ == 0) FinishGroup();
    }
  }

  // After the last chunk: what is left of a group that other teams go on with.
  __device__ void Finish() {
    if (units_left_ < plan_.group_units) FinishGroup();
  }

 private:
  __device__ void AddUnit(uint32_t tiles, uint32_t x) {
    uint32_t q[R][Decode::kWords];
    uint4 b[N];
#pragma unroll
    for (int r = 0; r < R; ++r) Decode::Load(tiles + r * kChunkBytes, lane_, q[r]);
#pragma unroll
    for (int n = 0; n < N; ++n) b[n] = LoadMatrices(x + n * 8 * kUnitRowBytes);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        qm::Mma16816(ones_, j == 0 ? b[n].x : b[n].z, j == 0 ? b[n].y : b[n].w, x_sum_[n], T{});
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        uint32_t a[4];
        Decode::Run(q[r], j, a);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          qm::Mma16816(a, j == 0 ? b[n].x : b[n].z, j == 0 ? b[n].y : b[n].w, part_[r][n], T{});
        }
      }
    }
  }

  __device__ void FinishGroup() {
    float scale[R][2], zero[R][2];
    const int strip_bytes = plan_.scale_bytes + plan_.zero_bytes;
    LoadRows<R>(slot_.at(), strip_bytes, lane_ / 4, scale_dtype_, scale);
    if (plan_.zero_bytes != 0) {
      LoadRows<R>(slot_.at() + plan_.scale_bytes, strip_bytes, lane_ / 4, zero_dtype_, zero);
    } else {
#pragma unroll
      for (int r = 0; r < R; ++r) zero[r][0] = zero[r][1] = middle_;
    }
    slot_.Next();
    units_left_ = plan_.group_units;
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = scale[r][half] / Decode::Step(half);
        const float offset = Decode::Base(half) + zero[r][half] * Decode::Step(half);
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int c = 2 * half; c < 2 * half + 2; ++c) {
            sum[r][n][c] += factor * (part_[r][n][c] - offset * x_sum_[n][c]);
            part_[r][n][c] = 0;
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) x_sum_[n][c] = 0;
    }
  }

  const TilePlan& plan_;
  Place stage_, slot_;
  const int lane_, tiles_, x_;
  const qm_dtype scale_dtype_, zero_dtype_;
  const float middle_;
  int unit_;
  int units_left_;  // of the group at hand
  uint32_t ones_[4];
  float part_[R][N][4] = {};  // the group at hand, unscaled
  float x_sum_[N][4] = {};    // sums of x over it; [2] and [3] repeat [0] and [1]
};

// The sums of all warps, through shared memory [team][row][outputs], to y: those of the teams in
// order, then those of the blocks of the cluster in order.
template <class T, class Shape>
__device__ inline void AddTeams(float* shared, int64_t out, int64_t first_out, int rows, T* y) {
  constexpr int kPitch = Shape::kTileOut + kTilePad;
  const auto cluster_size = static_cast<int>(gridDim.y);
  const int count = rows * Shape::kTileOut;
  const auto at = [](int i) { return i / Shape::kTileOut * kPitch + i % Shape::kTileOut; };
  const auto store = [&](int i, float value) {
    const int64_t output = first_out + i % Shape::kTileOut;
    if (output < out) y[i / Shape::kTileOut * out + output] = FromFloat<T>(value);
  };
  for (int i = threadIdx.x; i < count; i += Shape::kThreads) {
    float total = 0;
#pragma unroll
    for (int team = 0; team < Shape::kDepthWarps; ++team) {
      total += shared[team * rows * kPitch + at(i)];
    }
    if (cluster_size == 1) {
      store(i, total);
    } else {
      shared[at(i)] = total;  // of this thread alone
    }
  }
#if __CUDA_ARCH__ >= 900
  if (cluster_size == 1) return;
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  cluster.sync();
  const int first = static_cast<int>(blockIdx.y) * Shape::kThreads + threadIdx.x;
  for (int i = first; i < count; i += cluster_size * Shape::kThreads) {
    float total = 0;
    for (int block = 0; block < cluster_size; ++block) {
      total += cluster.map_shared_rank(shared, block)[at(i)];
    }
    store(i, total);
  }
  cluster.sync();  // nobody leaves while others read its memory
#endif
}

// x: [m, in], y: [m, out]. Dynamic shared memory: plan.shared_bytes.
template <class T, int kTileBits, class Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    TileKernel(const __grid_constant__ DeviceWeight w, const __grid_constant__ TilePlan plan,
               const T* x, int64_t m, T* y) {
  extern __shared__ __align__(128) unsigned char shared[];
  LetNextStart();
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * Shape::kTileRows;
  const int rows = static_cast<int>(min(m - first_row, static_cast<int64_t>(Shape::kTileRows)));
  const int64_t first_strip = static_cast<int64_t>(blockIdx.z) * Shape::kTileStrips;
  const int team = threadIdx.x / Shape::kTeamThreads, thread = threadIdx.x % Shape::kTeamThreads;
  const int warp = thread / 32, lane = threadIdx.x % 32;
  const uint32_t ring =
      Keep(static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + team * plan.team_bytes);

  const unsigned chunks = static_cast<unsigned>(w.chunks);
  const unsigned workers = gridDim.y * Shape::kDepthWarps;
  const unsigned worker = blockIdx.y * Shape::kDepthWarps + team;
  const int begin = static_cast<int>(chunks * worker / workers);
  const int end = static_cast<int>(chunks * (worker + 1) / workers);
  TileSums<T, kTileBits, Shape> sums(w, plan, ring, warp, lane, begin);
  TileLoader<kTileBits, Shape> tiles(w, plan, ring, first_strip, thread, begin);
  RowLoader<T, kTileBits, Shape> x_rows(w, plan, ring, x + first_row * w.in, rows, thread, begin);
  StartCopies<Shape>(tiles, x_rows, begin, end);
#pragma unroll 1
  for (int chunk = begin; chunk < end; ++chunk) {
    WaitCopies<Shape::kStages - 2>();
    MeetTeam<Shape>(team);  // all copies are there; the stage to fill next has been used
    if (chunk + Shape::kStages - 1 < end) {
      tiles.Next();
      x_rows.Next();
    }
    CommitCopies();
    sums.AddChunk();
  }
  if (begin < end) sums.Finish();
  WaitCopies<0>();
  __syncthreads();  // the rings are free

  constexpr int kPitch = Shape::kTileOut + kTilePad;
  float* partial = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int n = 0; n < Shape::kRowTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int row = (warp / Shape::kOutWarps * Shape::kRowTiles + n) * 8 + lane % 4 * 2 + c % 2;
      if (row >= rows) continue;
      const int output =
          warp % Shape::kOutWarps * Shape::kStrips * kStripRows + lane / 4 + c / 2 * 8;
#pragma unroll
      for (int r = 0; r < Shape::kStrips; ++r) {
        partial[(team * rows + row) * kPitch + output + r * kStripRows] = sums.sum[r][n][c];
      }
    }
  }
  __syncthreads();
  AddTeams<T, Shape>(partial, w.out, first_strip * kStripRows, rows, y + first_row * w.out);
}

}  // namespace affine

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_KERNEL_CUH_
