// The format's layout to tiles, once at load. Not tuned: it runs once per weight.
#include <vector>

#include "affine_cuda.h"
#include "affine_device.cuh"
#include "quantmill/sdk/cuda.hpp"

namespace affine {
namespace {

constexpr int kThreads = 256;

unsigned Blocks(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

// One thread per word of the tiles; it looks up which codes belong there. `w` is the plain weight;
// `permutation` (or null) maps sorted to stored columns.
__global__ void __launch_bounds__(kThreads)
    TilesKernel(DeviceWeight w, const int32_t* permutation, int64_t words, uint32_t* tiles) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= words) return;
  const int lane = static_cast<int>(index / 4 % 32);
  const int64_t chunk = index / 128 % w.chunks;
  const int64_t strip = index / 128 / w.chunks;
  const int units = UnitsPerChunk(w.tile_bits);
  uint32_t word = 0;
  for (int half = 0; half < 2; ++half) {
    const int64_t row = strip * kStripRows + half * 8 + lane / 4;
    if (row >= w.out) continue;
    for (int unit = 0; unit < units; ++unit) {
      for (int c = 0; c < 8; ++c) {
        const int64_t column = (chunk * units + unit) * kUnit + lane % 4 * 8 + c;
        const TilePlace place = LocateTile(w.tile_bits, w.chunks, row, column);
        if (place.word != index || column >= w.in) continue;
        const int64_t stored = permutation != nullptr ? permutation[column] : column;
        word |= LoadCode(w, row, stored) << place.shift;
      }
    }
  }
  tiles[index] = word;
}

// target[groups, padded] = transpose of source[out, groups], zero beyond `out`.
template <class T>
__global__ void __launch_bounds__(kThreads)
    TransposeKernel(const T* source, int64_t out, int64_t groups, int64_t padded, T* target) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= groups * padded) return;
  const int64_t group = index / padded, row = index % padded;
  target[index] = row < out ? source[row * groups + group] : T{};
}

// The same for bytes with ranges, as f32: target[groups, padded] of scales or of zero points.
__global__ void __launch_bounds__(kThreads)
    WidenKernel(DeviceWeight w, bool zero, int64_t padded, float* target) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= w.groups * padded) return;
  const int64_t group = index / padded, row = index % padded;
  const ScaleZero sz = row < w.out ? LoadDeviceScaleZero(w, row, group) : ScaleZero{0.0f, 0.0f};
  target[index] = zero ? sz.zero : sz.scale;
}

qm_status Transpose(qm_call* call, const void* source, qm_dtype dtype, const Weight& w,
                    int64_t padded, void* target) {
  const unsigned blocks = Blocks(w.groups * padded);
  const cudaStream_t stream = qm::Stream(call);
  switch (qm::ElementSize(dtype)) {
    case 1:
      TransposeKernel<<<blocks, kThreads, 0, stream>>>(static_cast<const uint8_t*>(source), w.out,
                                                       w.groups, padded,
                                                       static_cast<uint8_t*>(target));
      break;
    case 2:
      TransposeKernel<<<blocks, kThreads, 0, stream>>>(static_cast<const uint16_t*>(source), w.out,
                                                       w.groups, padded,
                                                       static_cast<uint16_t*>(target));
      break;
    default:
      TransposeKernel<<<blocks, kThreads, 0, stream>>>(static_cast<const uint32_t*>(source), w.out,
                                                       w.groups, padded,
                                                       static_cast<uint32_t*>(target));
  }
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

// Scales or zero points in the order of the tiles.
qm_status EmitTransposed(qm_call* call, const Weight& w, bool zero, int64_t padded,
                         Emitter* emitter) {
  const char* name = zero ? "zero" : "scale";
  const qm_dtype dtype = zero ? w.zero_dtype : w.scale_dtype;
  qm_tensor out;
  if ((zero ? w.zero_range : w.scale_range) == nullptr) {
    QM_TRY(emitter->Emit(name, call->device, dtype, {w.groups, padded}, &out));
    return Transpose(call, zero ? w.zero : w.scale, dtype, w, padded, out.data);
  }
  QM_TRY(emitter->Emit(name, call->device, QM_F32, {w.groups, padded}, &out));
  WidenKernel<<<Blocks(w.groups * padded), kThreads, 0, qm::Stream(call)>>>(
      ToDeviceWeight(w), zero, padded, static_cast<float*>(out.data));
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

// Columns sorted by group, on the device; leaves *permutation null where there is no group_index.
qm_status SortColumns(qm_call* call, const Weight& w, Emitter* emitter,
                      const int32_t** permutation) {
  *permutation = nullptr;
  if (w.group_index == nullptr) return QM_OK;
  std::vector<int32_t> index(w.in), order(w.in);
  const size_t bytes = static_cast<size_t>(w.in) * sizeof(int32_t);
  const cudaStream_t stream = qm::Stream(call);
  QM_CUDA(call, cudaMemcpyAsync(index.data(), w.group_index, bytes, cudaMemcpyDefault, stream));
  QM_CUDA(call, cudaStreamSynchronize(stream));
  if (!SortByGroup(index.data(), w.in, w.groups, order.data())) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "groups of unequal size cannot be sorted");
  }
  qm_tensor tensor;
  QM_TRY(emitter->Emit("permutation", call->device, QM_I32, {w.in}, &tensor));
  QM_CUDA(call, cudaMemcpyAsync(tensor.data, order.data(), bytes, cudaMemcpyDefault, stream));
  QM_CUDA(call, cudaStreamSynchronize(stream));  // `order` is on the stack
  *permutation = static_cast<const int32_t*>(tensor.data);
  return QM_OK;
}

}  // namespace

bool CudaTilesFit(const Weight& w) {
  return w.params.axis == 1 && w.in % kUnit == 0 && w.group_size % kUnit == 0;
}

qm_status CudaPrepack(qm_call* call, const Weight& w, qm_packed* out) {
  if (!CudaTilesFit(w)) {
    return qm::Fail(call, QM_UNIMPLEMENTED, "tiles need groups of a multiple of ", kUnit,
                    " input channels of a row");
  }
  Emitter emitter(call);
  const int32_t* permutation;
  QM_TRY(SortColumns(call, w, &emitter, &permutation));
  const DeviceWeight device = ToDeviceWeight(w);
  const int64_t strips = (w.out + kStripRows - 1) / kStripRows;
  const int64_t padded = strips * kStripRows;
  qm_tensor tiles;
  QM_TRY(emitter.Emit("tiles", call->device, QM_I32, {strips, device.chunks, 32, 4}, &tiles));
  const int64_t words = strips * device.chunks * 128;
  TilesKernel<<<Blocks(words), kThreads, 0, qm::Stream(call)>>>(device, permutation, words,
                                                                static_cast<uint32_t*>(tiles.data));
  QM_CUDA(call, cudaGetLastError());
  QM_TRY(EmitTransposed(call, w, false, padded, &emitter));
  if (w.zero != nullptr) QM_TRY(EmitTransposed(call, w, true, padded, &emitter));
  return emitter.FinishPacked(ParamsJson(w.params), w.out, w.in, out);
}

}  // namespace affine
