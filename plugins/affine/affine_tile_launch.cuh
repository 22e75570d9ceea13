// How a product with tiles is split and launched. Included by affine_tiles_DTYPE_BITS.cu, one per
// dtype and width.
#ifndef QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_LAUNCH_CUH_
#define QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_LAUNCH_CUH_

#include <algorithm>

#include "affine_multiply_tiles.h"
#include "affine_tile_kernel.cuh"
#include "quantmill/sdk/cuda.hpp"

namespace affine {

// What the launch asks of the device at hand.
struct DeviceLimits {
  int shared_bytes;  // of a block
  bool clusters;
};

inline qm_status ReadDeviceLimits(qm_call* call, DeviceLimits* limits) {
  const int device = call->device.index;
  int major = 0;
  QM_CUDA(call, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  QM_CUDA(call, cudaDeviceGetAttribute(&limits->shared_bytes,
                                       cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  limits->clusters = major >= 9;
  return QM_OK;
}

// Blocks to aim for when splitting the input channels: what an H100 or H200 holds at a time, two
// per multiprocessor. A constant, so that the split, and with it the order of sums, does not depend
// on how many multiprocessors a device has.
inline constexpr int64_t kTargetBlocks = 264;
inline constexpr int64_t kMaxSplits = 4;

// Blocks of a cluster: a power of two, with a chunk at least for every team.
template <class Shape>
int Splits(const DeviceWeight& w, int64_t m) {
  const int64_t row_tiles = (m + Shape::kTileRows - 1) / Shape::kTileRows;
  const int64_t blocks = (w.strips + Shape::kTileStrips - 1) / Shape::kTileStrips * row_tiles;
  int64_t splits = 1;
  while (2 * splits <= kMaxSplits && 2 * splits * blocks <= kTargetBlocks &&
         2 * splits * Shape::kDepthWarps <= w.chunks) {
    splits *= 2;
  }
  return static_cast<int>(splits);
}

template <class T, int kTileBits, class Shape>
qm_status LaunchTiles(qm_call* call, const DeviceWeight& w, const T* x, int64_t m, T* y,
                      const TilePlan& plan, bool clusters) {
  const auto kernel = TileKernel<T, kTileBits, Shape>;
  QM_CUDA(call, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     plan.shared_bytes));
  const unsigned splits = clusters ? static_cast<unsigned>(Splits<Shape>(w, m)) : 1;
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>((m + Shape::kTileRows - 1) / Shape::kTileRows), splits,
           static_cast<unsigned>((w.strips + Shape::kTileStrips - 1) / Shape::kTileStrips));
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = qm::Stream(call);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = 1;
  cluster.val.clusterDim.y = splits;
  cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = splits > 1 ? 1 : 0;
  QM_CUDA(call, cudaLaunchKernelEx(&config, kernel, w, plan, x, m, y));
  return QM_OK;
}

// Launches the first of the shapes that fits the device.
template <class T, int kTileBits, class Shape, class... Others>
qm_status LaunchFirstFitting(qm_call* call, const DeviceWeight& w, const T* x, int64_t m, T* y,
                             const DeviceLimits& limits) {
  const TilePlan plan = MakeTilePlan(w, Shape(), m);
  if (plan.shared_bytes <= limits.shared_bytes) {
    return LaunchTiles<T, kTileBits, Shape>(call, w, x, m, y, plan, limits.clusters);
  }
  if constexpr (sizeof...(Others) > 0) {
    return LaunchFirstFitting<T, kTileBits, Others...>(call, w, x, m, y, limits);
  } else {
    return qm::Fail(call, QM_UNIMPLEMENTED, "products with ", m, " rows need ", plan.shared_bytes,
                    " bytes of shared memory; the device has ", limits.shared_bytes);
  }
}

template <class T, int kTileBits>
qm_status MultiplyTiles(qm_call* call, const DeviceWeight& w, const T* x, int64_t m, T* y) {
  DeviceLimits limits;
  QM_TRY(ReadDeviceLimits(call, &limits));
  // Rows of x in tiles of eight, strips, warps for outputs, rows and input channels, stages.
  using One = TileShape<1, 2, 1, 1, 8, 3>;
  using Two = TileShape<2, 2, 1, 1, 8, 3>;
  using Many = TileShape<4, 4, 2, 2, 1, 3>;
  if (m <= 8) return LaunchFirstFitting<T, kTileBits, One>(call, w, x, m, y, limits);
  if (m <= 16) return LaunchFirstFitting<T, kTileBits, Two>(call, w, x, m, y, limits);
  return LaunchFirstFitting<T, kTileBits, Many>(call, w, x, m, y, limits);
}

}  // namespace affine

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_LAUNCH_CUH_
