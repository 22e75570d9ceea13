// Round to nearest on the GPU; the same bits as ptq_ref.cc (compiled with --fmad=false).
//
// Work is split so:
//   quantize_groups_kernel1   one warp per (row, group): range or search, scale, zero, codes (u8)
//   pack_kernel1              one thread per 32-bit word of the bit stream
// A chunk of rows goes through both before the next, so that the u8 codes take at most 16 MiB.
// Assumed: rows of the weight are contiguous; row chunks are multiples of one row.
// Instances of kernel1: groups of up to 128 and up to 256 live in registers; longer ones (a whole
// row per group) are read again on every pass, from L1 or L2.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "ptq.h"
#include "quantmill/sdk/affine_search.cuh"
#include "quantmill/sdk/cuda.hpp"

namespace quantmill::ptq {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kCodeBytes = int64_t{16} << 20;
constexpr unsigned long long kNoBadWeight = ~0ull;

struct Chunk {
  int64_t first_row;
  int64_t rows;
};

int64_t RowsPerChunk(const qm::AffineShape& shape) {
  return std::clamp<int64_t>(kCodeBytes / shape.in_features, 1, shape.out_features);
}

// weight: [out, in] with row stride; codes: u8 [chunk.rows, in]; scale, zero: [out, groups];
// bad: least index of a weight that is not finite.
template <int kCached>
__global__ void __launch_bounds__(kThreads)
    quantize_groups_kernel1(const float* __restrict__ weight, int64_t row_stride, Options options,
                            Chunk chunk, uint8_t* __restrict__ codes, void* __restrict__ scale,
                            uint8_t* __restrict__ zero, unsigned long long* bad) {
  const qm::AffineShape& shape = options.shape;
  const int64_t width = shape.group_width(), groups = shape.groups();
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (item >= chunk.rows * groups) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = item / groups, g = item % groups;
  const float* w = weight + (chunk.first_row + row) * row_stride + g * width;

  const qm::WarpGroup<kCached> values(w, width);
  const qm::AffineGroup group = qm::WarpFindAffineGroup(values, shape.rule, options.search);
  if (lane == 0) {
    const int64_t at = (chunk.first_row + row) * groups + g;
    qm::StoreScale(scale, shape.rule.scale_dtype, at, group.scale);
    if (zero != nullptr) zero[at] = static_cast<uint8_t>(group.zero);
  }
  const float max_code = shape.rule.max_code();
  uint8_t* out = codes + row * shape.in_features + g * width;
  int64_t i = lane;
  values.ForEach([&](float x) {
    if (!isfinite(x)) {
      atomicMin(bad, static_cast<unsigned long long>((chunk.first_row + row) * shape.in_features +
                                                     g * width + i));
    }
    out[i] = static_cast<uint8_t>(qm::EncodeAffine(x, group, max_code));
    i += 32;
  });
}

// codes: u8 [rows, in] -> packed: [rows, words]
__global__ void __launch_bounds__(kThreads)
    pack_kernel1(const uint8_t* __restrict__ codes, int64_t rows, int64_t in_features, int32_t bits,
                 int64_t words, int32_t* __restrict__ packed) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= rows * words) return;
  const int64_t row = index / words;
  packed[index] = static_cast<int32_t>(
      qm::PackWord(codes + row * in_features, in_features, bits, index % words));
}

unsigned Blocks(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

qm_status QuantizeGroupsLaunch(qm_call* call, const Options& options,
                               qm::TensorView<const float> weight, Chunk chunk, uint8_t* codes,
                               const qm::AffineTensors& out, unsigned long long* bad) {
  const unsigned blocks = Blocks(chunk.rows * options.shape.groups() * 32);
  const int64_t width = options.shape.group_width();
  const auto kernel = width <= 128   ? quantize_groups_kernel1<4>
                      : width <= 256 ? quantize_groups_kernel1<8>
                                     : quantize_groups_kernel1<0>;
  kernel<<<blocks, kThreads, 0, qm::Stream(call)>>>(weight.data(), weight.stride(0), options, chunk,
                                                    codes, out.scale.data,
                                                    static_cast<uint8_t*>(out.zero.data), bad);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

qm_status PackLaunch(qm_call* call, const qm::AffineShape& shape, Chunk chunk, const uint8_t* codes,
                     const qm::AffineTensors& out) {
  const int64_t words = qm::AffineWordsPerRow(shape.in_features, shape.rule.bits);
  pack_kernel1<<<Blocks(chunk.rows * words), kThreads, 0, qm::Stream(call)>>>(
      codes, chunk.rows, shape.in_features, shape.rule.bits, words,
      static_cast<int32_t*>(out.codes.data) + chunk.first_row * words);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

}  // namespace

uint64_t CudaScratchBytes(const qm::AffineShape& shape) {
  return static_cast<uint64_t>(RowsPerChunk(shape) * shape.in_features);
}

qm_status QuantizeCuda(qm_call* call, const Options& options, qm::TensorView<const float> weight,
                       const qm::AffineTensors& out) {
  const qm::AffineShape& shape = options.shape;
  const cudaStream_t stream = qm::Stream(call);
  const int64_t rows_per_chunk = RowsPerChunk(shape);
  uint8_t* codes = nullptr;
  unsigned long long* bad = nullptr;
  QM_TRY(qm::Scratch(call, call->device, rows_per_chunk * shape.in_features, "codes", &codes));
  QM_TRY(qm::Scratch(call, call->device, 1, "the finiteness check", &bad));
  QM_CUDA(call, cudaMemsetAsync(bad, 0xFF, sizeof *bad, stream));
  for (int64_t row = 0; row < shape.out_features; row += rows_per_chunk) {
    QM_TRY(qm::Progress(call, static_cast<double>(row) / static_cast<double>(shape.out_features)));
    const Chunk chunk = {row, std::min(rows_per_chunk, shape.out_features - row)};
    QM_TRY(QuantizeGroupsLaunch(call, options, weight, chunk, codes, out, bad));
    QM_TRY(PackLaunch(call, shape, chunk, codes, out));
  }
  unsigned long long first_bad = kNoBadWeight;
  QM_CUDA(call, cudaMemcpyAsync(&first_bad, bad, sizeof first_bad, cudaMemcpyDeviceToHost, stream));
  QM_CUDA(call, cudaStreamSynchronize(stream));
  if (first_bad == kNoBadWeight) return QM_OK;
  const int64_t index = static_cast<int64_t>(first_bad);
  return NotFinite(call, index / shape.in_features, index % shape.in_features);
}

}  // namespace quantmill::ptq
