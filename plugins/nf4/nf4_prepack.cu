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

// A thread per factor; kBytes: of double quantization, as they are.
template <bool kBytes, class F>
__global__ void __launch_bounds__(kThreads)
    nf4_factors_prepack_kernel1(DeviceWeight w, int64_t rows, F* factors) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t chunks = w.in / kChunkWeights;
  const int64_t row = index / chunks, chunk = index % chunks;
  if (row >= rows) return;
  const int64_t block = (row * w.in + chunk * kChunkWeights) >> w.block_shift;
  F factor = 0;
  if (row < w.out) {
    if constexpr (kBytes) factor = w.absmax_byte[block];
    if constexpr (!kBytes) factor = LoadAbsmax(w, block);
  }
  factors[TileFactor(row, chunk, chunks)] = factor;
}

// A copy of a vector of floats of the weight.
qm_status EmitSame(qm_call* call, const char* name, const float* values, int64_t count,
                   Emitter* emitter) {
  qm_tensor copy = {};
  QM_TRY(emitter->Emit(name, call->device, QM_F32, count, &copy));
  QM_CUDA(call, cudaMemcpyAsync(copy.data, values, static_cast<size_t>(count) * sizeof(float),
                                cudaMemcpyDeviceToDevice, qm::Stream(call)));
  return QM_OK;
}

qm_status EmitFactors(qm_call* call, const Weight& weight, int64_t rows, Emitter* emitter) {
  const DeviceWeight w = ToDeviceWeight(weight);
  const int64_t count = rows * (w.in / kChunkWeights);
  const bool bytes = KeepsBytes(weight.params);
  qm_tensor factors = {};
  QM_TRY(emitter->Emit("tile_absmax", call->device, bytes ? QM_U8 : QM_F32, count, &factors));
  const cudaStream_t stream = qm::Stream(call);
  if (!bytes) {
    nf4_factors_prepack_kernel1<false>
        <<<Blocks(count), kThreads, 0, stream>>>(w, rows, static_cast<float*>(factors.data));
    QM_CUDA(call, cudaGetLastError());
    return QM_OK;
  }
  nf4_factors_prepack_kernel1<true>
      <<<Blocks(count), kThreads, 0, stream>>>(w, rows, static_cast<uint8_t*>(factors.data));
  QM_CUDA(call, cudaGetLastError());
  const int64_t ranges = weight.params.NestedBlocks(weight.weights());
  QM_TRY(EmitSame(call, "nested_absmax", w.nested_absmax, ranges, emitter));
  QM_TRY(EmitSame(call, "nested_codebook", w.nested_codebook, kByteCodebookSize, emitter));
  return EmitSame(call, "absmax_offset", w.absmax_offset, 1, emitter);
}

}  // namespace

qm_status CudaPrepack(qm_call* call, const Weight& weight, qm_packed* out) {
  if (!TilesFit(weight.params, weight.in) ||
      reinterpret_cast<uintptr_t>(weight.codes) % sizeof(uint2) != 0) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "tiles need rows of a multiple of ", kChunkWeights,
                    " weights and blocks of ", kChunkWeights, " or more");
  }
  const DeviceWeight w = ToDeviceWeight(weight);
  const int64_t rows = TilesOf(w.out) * kTileOutputs;
  Emitter emitter(call);
  qm_tensor tiles = {};
  QM_TRY(emitter.Emit("tiles", call->device, QM_U8, rows * w.in / 2, &tiles));
  nf4_tiles_prepack_kernel1<<<Blocks(rows * w.in / 16), kThreads, 0, qm::Stream(call)>>>(
      w, rows, static_cast<uint2*>(tiles.data));
  QM_CUDA(call, cudaGetLastError());
  QM_TRY(EmitFactors(call, weight, rows, &emitter));
  QM_TRY(EmitSame(call, "codebook", w.codebook, kCodebookSize, &emitter));
  return emitter.FinishPacked(weight.params, w.out, w.in, out);
}

}  // namespace quantmill::nf4
