// How a product with tiles is split and launched. Included by affine_tiles_DTYPE_BITS.cu, one per
// dtype and width.
#ifndef QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_LAUNCH_CUH_
#define QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_LAUNCH_CUH_

#include <algorithm>

#include "affine_multiply_tiles.h"
#include "affine_wide_kernel.cuh"
#include "quantmill/sdk/cuda.hpp"

namespace affine {

// What a launch asks of the device at hand.
struct DeviceLimits {
  int shared_bytes;  // of a block
  bool hopper;       // clusters, launches that depend on another, wgmma
};

inline qm_status ReadDeviceLimits(qm_call* call, DeviceLimits* limits) {
  const int device = call->device.index;
  int major = 0;
  QM_CUDA(call, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  QM_CUDA(call, cudaDeviceGetAttribute(&limits->shared_bytes,
                                       cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  limits->hopper = major == 9;
  return QM_OK;
}

// Of one product.
template <class T>
struct Product {
  const DeviceWeight& w;
  const T* x;
  int64_t m;
  T* y;
};

// Blocks to aim for when splitting the input channels: what an H100 or H200 holds at a time, two
// per multiprocessor. A constant, so that the split, and with it the order of sums, does not depend
// on how many multiprocessors a device has.
inline constexpr int64_t kTargetBlocks = 264;
inline constexpr int64_t kMaxSplits = 8;  // blocks of a cluster that every device takes

template <class Shape>
dim3 Grid(const DeviceWeight& w, int64_t m) {
  const int64_t tiles = (w.strips + Shape::kTileStrips - 1) / Shape::kTileStrips;
  return dim3(static_cast<unsigned>((m + Shape::kTileRows - 1) / Shape::kTileRows), 1,
              static_cast<unsigned>(tiles));
}

// Blocks that share a tile's input channels: a power of two, with a chunk at least for every team.
template <class Shape>
unsigned Splits(const DeviceWeight& w, const dim3& grid, int64_t target_blocks) {
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.z;
  int64_t splits = 1;
  while (2 * splits <= kMaxSplits && 2 * splits * blocks <= target_blocks &&
         2 * splits * Shape::kDepthWarps <= w.chunks) {
    splits *= 2;
  }
  return static_cast<unsigned>(splits);
}

template <class T, class Shape, class Kernel>
qm_status Launch(qm_call* call, Kernel kernel, const Product<T>& p, const TilePlan& plan,
                 const DeviceLimits& limits) {
  QM_CUDA(call, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     plan.shared_bytes));
  cudaLaunchConfig_t config = {};
  config.gridDim = Grid<Shape>(p.w, p.m);
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = qm::Stream(call);
  cudaLaunchAttribute attributes[2] = {};
  if (limits.hopper) {
    const unsigned splits = Splits<Shape>(p.w, config.gridDim, kTargetBlocks);
    config.gridDim.y = splits;
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = 1;
    attributes[1].val.clusterDim.y = splits;
    attributes[1].val.clusterDim.z = 1;
    config.attrs = attributes;
    config.numAttrs = splits > 1 ? 2 : 1;
  }
  QM_CUDA(call, cudaLaunchKernelEx(&config, kernel, p.w, plan, p.x, p.m, p.y));
  return QM_OK;
}

// Launches the first of the shapes that fits the device.
template <class T, int kTileBits, class Shape, class... Others>
qm_status LaunchTiles(qm_call* call, const Product<T>& p, const DeviceLimits& limits) {
  const TilePlan plan = MakeTilePlan(p.w, Shape(), p.m);
  if (plan.shared_bytes <= limits.shared_bytes) {
    return Launch<T, Shape>(call, TileKernel<T, kTileBits, Shape>, p, plan, limits);
  }
  if constexpr (sizeof...(Others) > 0) {
    return LaunchTiles<T, kTileBits, Others...>(call, p, limits);
  } else {
    return qm::Fail(call, QM_UNIMPLEMENTED, "a product with ", p.m, " rows needs ",
                    plan.shared_bytes, " bytes of shared memory; the device has ",
                    limits.shared_bytes);
  }
}

template <class T, int kTileBits, class Shape>
qm_status LaunchWide(qm_call* call, const Product<T>& p, const DeviceLimits& limits) {
  const TilePlan plan = MakeTilePlan(p.w, Shape(), p.m);
  if (plan.group_units % kChunkUnits == 0) {
    return Launch<T, Shape>(call, WideKernel<T, kTileBits, Shape, kChunkUnits>, p, plan, limits);
  }
  return Launch<T, Shape>(call, WideKernel<T, kTileBits, Shape, 2>, p, plan, limits);
}

template <class T, int kTileBits>
qm_status MultiplyTiles(qm_call* call, const DeviceWeight& w, const T* x, int64_t m, T* y) {
  DeviceLimits limits;
  QM_TRY(ReadDeviceLimits(call, &limits));
  const Product<T> p = {w, x, m, y};
  constexpr int kStages = kTileBits == 8 ? 3 : 4;  // as fit twice
  const bool wide = limits.hopper && w.group_size % (2 * kUnit) == 0;
  // Rows of x in tiles of eight, strips, warps for outputs, rows and input channels, stages.
  if (m <= 8) {
    return LaunchTiles<T, kTileBits, TileShape<1, 2, 1, 1, 8, 3>, TileShape<1, 2, 1, 1, 4, 3>>(
        call, p, limits);
  }
  if (wide && m > 64) return LaunchWide<T, kTileBits, WideShape<128, kStages>>(call, p, limits);
  if (wide && m > 16) return LaunchWide<T, kTileBits, WideShape<64, kStages>>(call, p, limits);
  if (m <= 16) {
    return LaunchTiles<T, kTileBits, TileShape<2, 2, 1, 1, 8, 3>, TileShape<2, 2, 1, 1, 4, 2>>(
        call, p, limits);
  }
  return LaunchTiles<T, kTileBits, TileShape<4, 4, 2, 2, 1, 3>>(call, p, limits);
}

}  // namespace affine

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_LAUNCH_CUH_
