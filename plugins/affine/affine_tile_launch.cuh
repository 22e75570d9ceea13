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

// How far a tile's input channels are split over the blocks of a cluster: up to `blocks` in all and
// `most` for a tile, each with `chunks` at least. Constants, so that the split, and with it the
// order of sums, does not depend on how many multiprocessors a device has; 132 is what an H100 and
// an H200 have. Measured on an H200, as the choice of shapes below.
struct SplitLimits {
  int64_t blocks, most, chunks;
};

template <class Shape>
dim3 Grid(const DeviceWeight& w, int64_t m) {
  const int64_t tiles = (w.strips + Shape::kTileStrips - 1) / Shape::kTileStrips;
  return dim3(static_cast<unsigned>((m + Shape::kTileRows - 1) / Shape::kTileRows), 1,
              static_cast<unsigned>(tiles));
}

// A power of two.
inline unsigned Splits(const DeviceWeight& w, const dim3& grid, const SplitLimits& limits) {
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.z;
  int64_t splits = 1;
  while (2 * splits <= limits.most && 2 * splits * blocks <= limits.blocks &&
         2 * splits * limits.chunks <= w.chunks) {
    splits *= 2;
  }
  return static_cast<unsigned>(splits);
}

template <class T, class Shape, class Kernel>
qm_status Launch(qm_call* call, Kernel kernel, const Product<T>& p, const TilePlan& plan,
                 const DeviceLimits& limits, const SplitLimits& split_limits) {
  QM_CUDA(call, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     plan.shared_bytes));
  cudaLaunchConfig_t config = {};
  config.gridDim = Grid<Shape>(p.w, p.m);
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = qm::Stream(call);
  cudaLaunchAttribute attributes[2] = {};
  if (limits.hopper) {
    const unsigned splits = Splits(p.w, config.gridDim, split_limits);
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
    return Launch<T, Shape>(call, TileKernel<T, kTileBits, Shape>, p, plan, limits,
                            {132, 8, Shape::kDepthWarps});
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
qm_status LaunchWide(qm_call* call, const Product<T>& p, const DeviceLimits& limits,
                     const SplitLimits& split_limits) {
  const TilePlan plan = MakeTilePlan(p.w, Shape(), p.m);
  const auto kernel = plan.group_units % kChunkUnits == 0
                          ? WideKernel<T, kTileBits, Shape, kChunkUnits>
                          : WideKernel<T, kTileBits, Shape, 2>;
  return Launch<T, Shape>(call, kernel, p, plan, limits, split_limits);
}

// Up to 16 rows, where reading the weight takes most of the time. Few strips want every
// multiprocessor in one wave of large blocks; many strips, small blocks that follow each other.
// TileShape: rows of x in tiles of eight, strips, warps for outputs, rows and input channels,
// stages. The last shape of a list fits every device.
template <class T, int kTileBits>
qm_status MultiplyFew(qm_call* call, const Product<T>& p, const DeviceLimits& limits) {
  const int64_t strips = p.w.strips;
  if constexpr (kTileBits == 8) {
    using Last = TileShape<1, 1, 1, 1, 8, 2>;
    using LastTwo = TileShape<2, 2, 4, 1, 2, 2>;
    if (p.m > 8) return LaunchTiles<T, 8, TileShape<2, 2, 1, 1, 8, 3>, LastTwo>(call, p, limits);
    if (strips <= 2 * 132) {
      return LaunchTiles<T, 8, TileShape<1, 1, 1, 1, 16, 2>, Last>(call, p, limits);
    }
    return LaunchTiles<T, 8, TileShape<1, 2, 1, 1, 8, 3>, Last>(call, p, limits);
  } else {
    using Last = TileShape<1, 4, 1, 1, 4, 3>;
    using LastTwo = TileShape<2, 2, 4, 1, 2, 3>;
    if (p.m > 8 && strips > 4 * 132) return LaunchTiles<T, kTileBits, LastTwo>(call, p, limits);
    if (p.m > 8) {
      return LaunchTiles<T, kTileBits, TileShape<2, 4, 1, 1, 8, 2>, LastTwo>(call, p, limits);
    }
    if (strips <= 2 * 132) {
      return LaunchTiles<T, kTileBits, TileShape<1, 2, 1, 1, 16, 3>, Last>(call, p, limits);
    }
    if (strips <= 4 * 132) {
      return LaunchTiles<T, kTileBits, TileShape<1, 4, 1, 1, 16, 2>, Last>(call, p, limits);
    }
    return LaunchTiles<T, kTileBits, Last>(call, p, limits);
  }
}

template <class T, int kTileBits>
qm_status MultiplyTiles(qm_call* call, const DeviceWeight& w, const T* x, int64_t m, T* y) {
  DeviceLimits limits;
  QM_TRY(ReadDeviceLimits(call, &limits));
  const Product<T> p = {w, x, m, y};
  constexpr int kStages = kTileBits == 8 ? 3 : 4;
  const bool wide = limits.hopper && w.group_size % (2 * kUnit) == 0;
  if constexpr (kTileBits == 8) {
    if (wide && m > 8 && m <= 16 && w.strips > 2 * 132) {
      return LaunchWide<T, kTileBits, WideShape<16, kStages>>(call, p, limits, {264, 8, 8});
    }
  }
  if (m <= 16) return MultiplyFew<T, kTileBits>(call, p, limits);
  if (!wide) return LaunchTiles<T, kTileBits, TileShape<4, 4, 2, 2, 1, 3>>(call, p, limits);
  if (m <= 32) {
    return LaunchWide<T, kTileBits, WideShape<32, kStages>>(call, p, limits, {264, 8, 8});
  }
  if (m <= 64) {
    return LaunchWide<T, kTileBits, WideShape<64, kStages>>(call, p, limits, {264, 8, 8});
  }
  return LaunchWide<T, kTileBits, WideShape<128, kStages>>(call, p, limits, {132, 2, 8});
}

}  // namespace affine

#endif  // QUANTMILL_PLUGINS_AFFINE_AFFINE_TILE_LAUNCH_CUH_
