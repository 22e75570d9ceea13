// y = x W^T on the GPU: which kernel serves what, and the plain one.
//   1. row8_plain_kernel1: any width and type, a block per output and eight rows of x; the one to
//      compare with.
//   2. row8_tiles_kernel1 (row8_tiles.cuh): tensor cores, for f16, bf16, and quantized activations.
// Quantized activations are rounded into the workspace first; then every number of rows is served.
#include <type_traits>

#include "quantmill/sdk/cuda.hpp"
#include "row8_cuda.h"

namespace eetq {
namespace {

constexpr int kThreads = 128;

__device__ inline float AsFloat(float value) { return value; }
__device__ inline float AsFloat(__half value) { return __half2float(value); }
__device__ inline float AsFloat(__nv_bfloat16 value) { return __bfloat162float(value); }

// y[r, row] for one row of W and up to kCudaPlainMaxRows rows of x. X int8_t: whole numbers, summed
// in int32.
template <Code kCode, class X>
__global__ void __launch_bounds__(kThreads) row8_plain_kernel1(DeviceProduct p) {
  using Sum = std::conditional_t<std::is_same_v<X, int8_t>, int, float>;
  constexpr int kRows = static_cast<int>(kCudaPlainMaxRows);
  const int64_t row = blockIdx.x, first = static_cast<int64_t>(blockIdx.y) * kRows;
  const int rows = static_cast<int>(min(static_cast<int64_t>(kRows), p.rows - first));
  const X* x = static_cast<const X*>(p.x) + first * p.in;
  Sum sums[kRows] = {};
  for (int64_t k = threadIdx.x; k < p.in; k += kThreads) {
    const uint8_t code = p.codes[row * p.in + k];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      if constexpr (std::is_same_v<X, int8_t>) {
        sums[r] += static_cast<int8_t>(code) * x[r * p.in + k];
      } else {
        sums[r] += ValueOf<kCode>(code) * AsFloat(x[r * p.in + k]);
      }
    }
  }
  __shared__ Sum shared[kThreads];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;  // the same for all threads
    shared[threadIdx.x] = sums[r];
    __syncthreads();
    for (int width = kThreads / 2; width > 0; width /= 2) {
      if (threadIdx.x < width) shared[threadIdx.x] += shared[threadIdx.x + width];
      __syncthreads();
    }
    if (threadIdx.x == 0) StoreResult(p, first + r, row, static_cast<float>(shared[0]));
    __syncthreads();
  }
}

template <Code kCode, class X>
qm_status LaunchPlain(qm_call* call, const DeviceProduct& p) {
  const int64_t slices = (p.rows + kCudaPlainMaxRows - 1) / kCudaPlainMaxRows;
  if (slices > 65535) {
    return qm::Fail(call, QM_INVALID_ARGUMENT, p.rows, " rows of x are too many for in_features ",
                    "that are no multiple of ", kTileAlignment, "; pass at most ",
                    65535 * kCudaPlainMaxRows);
  }
  const dim3 grid(static_cast<unsigned>(p.out), static_cast<unsigned>(slices));
  row8_plain_kernel1<kCode, X><<<grid, kThreads, 0, qm::Stream(call)>>>(p);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

template <Code kCode>
qm_status Plain(qm_call* call, const DeviceProduct& p, qm_dtype x_dtype) {
  if constexpr (kCode == Code::kInt8) {
    if (x_dtype == QM_I8) return LaunchPlain<kCode, int8_t>(call, p);
  }
  if (x_dtype == QM_F32) return LaunchPlain<kCode, float>(call, p);
  if (x_dtype == QM_F16) return LaunchPlain<kCode, __half>(call, p);
  return LaunchPlain<kCode, __nv_bfloat16>(call, p);
}

bool Tileable(const DeviceProduct& p, qm_dtype x_dtype) {
  const auto aligned = [](const void* address) {
    return reinterpret_cast<uintptr_t>(address) % 16 == 0;
  };
  return x_dtype != QM_F32 && p.in % kTileAlignment == 0 && aligned(p.codes) && aligned(p.x);
}

qm_status Multiply(qm_call* call, Code code, const DeviceProduct& p, qm_dtype x_dtype) {
  const bool tiles = Tileable(p, x_dtype);
  switch (code) {
    case Code::kInt8:
      return tiles ? MultiplyTiles<Code::kInt8>(call, p, x_dtype)
                   : Plain<Code::kInt8>(call, p, x_dtype);
    case Code::kE4M3:
      return tiles ? MultiplyTiles<Code::kE4M3>(call, p, x_dtype)
                   : Plain<Code::kE4M3>(call, p, x_dtype);
    default:
      return tiles ? MultiplyTiles<Code::kE5M2>(call, p, x_dtype)
                   : Plain<Code::kE5M2>(call, p, x_dtype);
  }
}

int64_t RoundUp(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Bytes of rounded activations, before their scales.
int64_t RoundedBytes(const Weight& w, int64_t rows) {
  return RoundUp(rows * w.in * (w.params.code == Code::kInt8 ? 1 : 2));
}

}  // namespace

uint64_t CudaWorkspaceBytes(const Weight& w, int64_t max_rows) {
  if (!w.params.activations) return 0;
  return static_cast<uint64_t>(RoundedBytes(w, max_rows) +
                               max_rows * static_cast<int64_t>(sizeof(float)));
}

qm_status CudaMatmul(qm_call* call, const Weight& w, const qm_tensor& x, void* workspace,
                     qm_tensor* y) {
  DeviceProduct p = {w.codes,    w.scale, w.scale_dtype, w.params.per_tensor,
                     w.out,      w.in,    x.data,        nullptr,
                     x.shape[0], y->data, y->dtype};
  if (w.params.activations) {
    if (workspace == nullptr) {
      return qm::Fail(call, QM_INVALID_ARGUMENT, "this product needs a workspace of ",
                      CudaWorkspaceBytes(w, p.rows), " bytes");
    }
    float* scale =
        reinterpret_cast<float*>(static_cast<char*>(workspace) + RoundedBytes(w, p.rows));
    QM_TRY(QuantizeActivations(call, w.params.code, x, workspace, scale));
    p.x = workspace;
    p.row_scale = scale;
    return Multiply(call, w.params.code, p, w.params.code == Code::kInt8 ? QM_I8 : QM_F16);
  }
  const int64_t most = Tileable(p, x.dtype) ? kCudaMaxRows : kCudaPlainMaxRows;
  if (p.rows > most) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "products with packed weights are served for up to ",
                    most, " rows here");
  }
  return Multiply(call, w.params.code, p, x.dtype);
}

}  // namespace eetq
