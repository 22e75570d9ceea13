// y = x W^T with packed W on the GPU. Three kernels, and their helpers:
//   1. PlainKernel: any layout and dtype, a block per output; for f32 and as the one to compare
//      with.
//   2. TileKernel (affine_tile_kernel.cuh): tensor cores over tiles, for f16 and bf16. Rows are put
//      into the order of the tiles first where the weight has a permutation.
//   3. WideKernel (affine_wide_kernel.cuh): the same with many rows, on Hopper.
#include <algorithm>
#include <cstdint>

#include "affine_cuda.h"
#include "affine_device.cuh"
#include "affine_multiply_tiles.h"
#include "quantmill/sdk/cuda.hpp"

namespace affine {
namespace {

constexpr int kPlainThreads = 128;

// x: [m, in], y: [m, out]; m <= kCudaPlainMaxRows. One block per output.
template <class T>
__global__ void __launch_bounds__(kPlainThreads)
    PlainKernel(DeviceWeight w, const T* x, int m, T* y) {
  const int64_t row = blockIdx.x;
  float sums[kCudaPlainMaxRows] = {};
  for (int64_t k = threadIdx.x; k < w.in; k += kPlainThreads) {
    const ScaleZero sz = LoadScaleZeroAtPlace(w, ScalePlace(w, row, k));
    const float value = sz.scale * (static_cast<float>(LoadCode(w, row, k)) - sz.zero);
    const int64_t column = w.permutation != nullptr ? w.permutation[k] : k;
    for (int r = 0; r < m; ++r) sums[r] += value * AsFloat(x[r * w.in + column]);
  }
  __shared__ float shared[kPlainThreads];
  for (int r = 0; r < m; ++r) {
    shared[threadIdx.x] = sums[r];
    __syncthreads();
    for (int width = kPlainThreads / 2; width > 0; width /= 2) {
      if (threadIdx.x < width) shared[threadIdx.x] += shared[threadIdx.x + width];
      __syncthreads();
    }
    if (threadIdx.x == 0) y[r * w.out + row] = FromFloat<T>(shared[0]);
    __syncthreads();
  }
}

// sorted[r, i] = x[r, permutation[i]].
template <class T>
__global__ void __launch_bounds__(256)
    PermuteKernel(const T* x, const int32_t* permutation, int64_t rows, int64_t in, T* sorted) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= rows * in) return;
  sorted[i] = x[i / in * in + permutation[i % in]];
}

template <class T>
qm_status RunTiles(qm_call* call, const DeviceWeight& weight, const T* x, int64_t m,
                   void* workspace, T* y) {
  DeviceWeight w = weight;
  if (w.permutation != nullptr) {
    T* sorted = static_cast<T*>(workspace);
    const unsigned blocks = static_cast<unsigned>((m * w.in + 255) / 256);
    PermuteKernel<<<blocks, 256, 0, qm::Stream(call)>>>(x, w.permutation, m, w.in, sorted);
    QM_CUDA(call, cudaGetLastError());
    x = sorted;
    w.permutation = nullptr;
  }
  switch (w.tile_bits) {
    case 2:
      return MultiplyTiles<T, 2>(call, w, x, m, y);
    case 3:
      return MultiplyTiles<T, 3>(call, w, x, m, y);
    case 4:
      return MultiplyTiles<T, 4>(call, w, x, m, y);
    default:
      return MultiplyTiles<T, 8>(call, w, x, m, y);
  }
}

template <class T>
qm_status RunPlain(qm_call* call, const DeviceWeight& w, const qm_tensor& x, qm_tensor* y) {
  PlainKernel<<<static_cast<unsigned>(w.out), kPlainThreads, 0, qm::Stream(call)>>>(
      w, static_cast<const T*>(x.data), static_cast<int>(x.shape[0]), static_cast<T*>(y->data));
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

}  // namespace

uint64_t CudaWorkspaceBytes(const Weight& weight, int64_t max_rows) {
  if (weight.tiles == nullptr) return 0;
  if (weight.permutation == nullptr) return 0;
  return static_cast<uint64_t>(std::min<int64_t>(max_rows, kCudaMaxRows) * weight.in * 2);
}

qm_status CudaMatmul(qm_call* call, const Weight& weight, const qm_tensor& x, void* workspace,
                     qm_tensor* y) {
  const DeviceWeight w = ToDeviceWeight(weight);
  const int64_t m = x.shape[0];
  if (weight.tiles != nullptr && x.dtype != QM_F32 && m <= kCudaMaxRows) {
    if (workspace == nullptr && CudaWorkspaceBytes(weight, m) > 0) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "this product needs a workspace of ",
                      CudaWorkspaceBytes(weight, m), " bytes");
    }
    // Rows are copied 16 bytes at a time; they are multiples of 64 bytes.
    if (reinterpret_cast<uintptr_t>(x.data) % 16 != 0) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "x must lie at a multiple of 16 bytes");
    }
    if (x.dtype == QM_F16) {
      return RunTiles(call, w, static_cast<const __half*>(x.data), m, workspace,
                      static_cast<__half*>(y->data));
    }
    return RunTiles(call, w, static_cast<const __nv_bfloat16*>(x.data), m, workspace,
                    static_cast<__nv_bfloat16*>(y->data));
  }
  if (m > kCudaPlainMaxRows) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "products with packed weights are served for up to ",
                    weight.tiles != nullptr && x.dtype != QM_F32 ? kCudaMaxRows : kCudaPlainMaxRows,
                    " rows here");
  }
  if (x.dtype == QM_F32) return RunPlain<float>(call, w, x, y);
  if (x.dtype == QM_F16) return RunPlain<__half>(call, w, x, y);
  return RunPlain<__nv_bfloat16>(call, w, x, y);
}

}  // namespace affine
