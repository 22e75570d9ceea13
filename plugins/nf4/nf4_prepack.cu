// From the format's layout to tiles (nf4_tiles.h), once at load. Not tuned: it runs once per
// weight.
#include "nf4_device.cuh"
#include "nf4_math.h"
#include "nf4_tiles.h"
#include "quantmill/sdk/cuda.hpp"

namespace quantmill::nf4 {
namespace {

constexpr int kThreads = 256;

unsigned Blocks(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

// A thread per eight codes' bytes: what a lane holds of one output of one chunk.
__global__ void __launch_bounds__(kThreads)
    nf4_tiles_prepack_kernel1(DeviceWeight w, int64_t rows, uint2* tiles) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t pieces = w.in / 16;
  const int64_t row = index / pieces, column = index % pieces * 16;
  if (row >= rows) return;
  uint2 codes = make_uint2(0, 0);
  if (row < w.out) codes = *reinterpret_cast<const uint2*>(w.codes + (row * w.in + column) / 2);
  tiles[TileByte(row, column, w.in / kChunkWeights) / 8] = codes;
}

// A thread per factor.
__global__ void __launch_bounds__(kThreads)
    nf4_factors_prepack_kernel1(DeviceWeight w, int64_t rows, float* factors) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t chunks = w.in / kChunkWeights;
  const int64_t row = index / chunks, chunk = index % chunks;
  if (row >= rows) return;
  const int64_t weight = row * w.in + chunk * kChunkWeights;
  factors[TileFactor(row, chunk, chunks)] =
      row < w.out ? LoadAbsmax(w, weight >> w.block_shift) : 0.0f;
}

}  // namespace

qm_status CudaPrepack(qm_call* call, const Weight& weight, qm_packed* out) {
  if (!TilesFit(weight.params, weight.in) ||
      reinterpret_cast<uintptr_t>(weight.codes) % sizeof(uint2) != 0) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "tiles need rows of a multiple of ", kChunkWeights,
                    " weights and blocks of ", kChunkWeights, " or more");
  }
  const DeviceWeight w = ToDeviceWeight(weight);
  const int64_t rows = TilesOf(w.out) * kTileOutputs, chunks = w.in / kChunkWeights;
  Emitter emitter(call);
  qm_tensor tiles = {}, factors = {}, codebook = {};
  QM_TRY(emitter.Emit("tiles", call->device, QM_U8, rows * w.in / 2, &tiles));
  QM_TRY(emitter.Emit("tile_absmax", call->device, QM_F32, rows * chunks, &factors));
  QM_TRY(emitter.Emit("codebook", call->device, QM_F32, kCodebookSize, &codebook));
  const cudaStream_t stream = qm::Stream(call);
  nf4_tiles_prepack_kernel1<<<Blocks(rows * w.in / 16), kThreads, 0, stream>>>(
      w, rows, static_cast<uint2*>(tiles.data));
  QM_CUDA(call, cudaGetLastError());
  nf4_factors_prepack_kernel1<<<Blocks(rows * chunks), kThreads, 0, stream>>>(
      w, rows, static_cast<float*>(factors.data));
  QM_CUDA(call, cudaGetLastError());
  QM_CUDA(call, cudaMemcpyAsync(codebook.data, w.codebook, kCodebookSize * sizeof(float),
                                cudaMemcpyDeviceToDevice, stream));
  return emitter.FinishPacked(weight.params, w.out, w.in, out);
}

}  // namespace quantmill::nf4
