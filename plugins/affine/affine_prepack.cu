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

// The first lane whose codes lie in a word of a unit; in words of high bits the next lane's do too.
__device__ int LaneOf(int tile_bits, int word) {
  if (tile_bits == 3) return word < 32 ? word : 2 * (word - 32);
  return word / (tile_bits / 2);
}

// One thread per word of the tiles; it looks up which codes belong there. `w` is the plain weight;
// `permutation` (or null) maps sorted to stored columns.
__global__ void __launch_bounds__(kThreads)
    TilesKernel(DeviceWeight w, const int32_t* permutation, int64_t words, uint32_t* tiles) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= words) return;
  const int unit_words = UnitWords(w.tile_bits);
  const int64_t unit = index / unit_words, strip = unit / (w.chunks * kChunkUnits);
  const int first_lane = LaneOf(w.tile_bits, static_cast<int>(index % unit_words));
  uint32_t word = 0;
  for (int i = 0; i < 32; ++i) {  // two lanes, two rows, eight channels
    const int lane = first_lane + i / 16;
    const int64_t row = strip * kStripRows + i / 8 % 2 * 8 + lane / 4;
    const int64_t column =
        unit % (w.chunks * kChunkUnits) * kUnit + i % 8 / 2 * 8 + lane % 4 * 2 + i % 2;
    if (lane >= 32 || row >= w.out || column >= w.in) continue;
    const TilePlace place = LocateTile(w.tile_bits, w.chunks, row, column);
    if (place.word != index && place.high_word != index) continue;
    const uint32_t code = LoadCode(w, row, permutation != nullptr ? permutation[column] : column);
    const uint32_t low = place.high_word < 0 ? code : code & 3u;
    word |= place.word == index ? low << place.shift : (code >> 2) << place.high_shift;
  }
  tiles[index] = word;
}

// target[strip, group, 16 rows] from source[out, groups], zero beyond `out`.
template <class T>
__global__ void __launch_bounds__(kThreads)
    GroupsKernel(const T* source, int64_t out, int64_t groups, int64_t count, T* target) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  const int64_t row = index / kStripRows / groups * kStripRows + index % kStripRows;
  target[index] = row < out ? source[row * groups + index / kStripRows % groups] : T{};
}

// The same for bytes with ranges, as f32, of scales or of zero points.
__global__ void __launch_bounds__(kThreads)
    WidenKernel(DeviceWeight w, bool zero, int64_t count, float* target) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  const int64_t row = index / kStripRows / w.groups * kStripRows + index % kStripRows;
  const int64_t place = row * w.groups + index / kStripRows % w.groups;
  const ScaleZero sz = row < w.out ? LoadScaleZeroAtPlace(w, place) : ScaleZero{0.0f, 0.0f};
  target[index] = zero ? sz.zero : sz.scale;
}

template <class T>
qm_status ArrangeGroups(qm_call* call, const void* source, const Weight& w, int64_t count,
                        void* target) {
  GroupsKernel<<<Blocks(count), kThreads, 0, qm::Stream(call)>>>(
      static_cast<const T*>(source), w.out, w.groups, count, static_cast<T*>(target));
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

// Scales or zero points in the order of the tiles.
qm_status EmitGroups(qm_call* call, const Weight& w, bool zero, int64_t strips, Emitter* emitter) {
  const char* name = zero ? "zero" : "scale";
  const void* source = zero ? w.zero : w.scale;
  const qm_dtype dtype = zero ? w.zero_dtype : w.scale_dtype;
  const int64_t count = strips * w.groups * kStripRows;
  const bool ranged = (zero ? w.zero_range : w.scale_range) != nullptr;
  qm_tensor out;
  QM_TRY(emitter->Emit(name, call->device, ranged ? QM_F32 : dtype, {strips, w.groups * kStripRows},
                       &out));
  if (ranged) {
    WidenKernel<<<Blocks(count), kThreads, 0, qm::Stream(call)>>>(ToDeviceWeight(w), zero, count,
                                                                  static_cast<float*>(out.data));
    QM_CUDA(call, cudaGetLastError());
    return QM_OK;
  }
  switch (qm::ElementSize(dtype)) {
    case 1:
      return ArrangeGroups<uint8_t>(call, source, w, count, out.data);
    case 2:
      return ArrangeGroups<uint16_t>(call, source, w, count, out.data);
    default:
      return ArrangeGroups<uint32_t>(call, source, w, count, out.data);
  }
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
  const int64_t strip_words = device.chunks * kChunkUnits * UnitWords(device.tile_bits);
  const int64_t words = device.strips * strip_words;
  qm_tensor tiles;
  QM_TRY(emitter.Emit("tiles", call->device, QM_I32, {device.strips, strip_words}, &tiles));
  TilesKernel<<<Blocks(words), kThreads, 0, qm::Stream(call)>>>(device, permutation, words,
                                                                static_cast<uint32_t*>(tiles.data));
  QM_CUDA(call, cudaGetLastError());
  QM_TRY(EmitGroups(call, w, false, device.strips, &emitter));
  if (w.zero != nullptr) QM_TRY(EmitGroups(call, w, true, device.strips, &emitter));
  return emitter.FinishPacked(ParamsJson(w.params), w.out, w.in, out);
}

}  // namespace affine
