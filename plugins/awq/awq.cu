// The operations of awq.h on the GPU; the same bits as awq_ref.cc (compiled with --fmad=false).
//
//   v = w s;  Q(v) = scale (clamp(round(v / scale) + zero, 0, 2^bits - 1) - zero), the range of a
//   group widened to hold 0;  w f32 [rows, columns], rows contiguous, s f32 [columns]
//
// Work is split so (a group is `width` neighbouring columns of a row):
//   fake_quant_kernel1   a warp per group: range by shuffles, then Q(v) / s or Q(v) / s - w
//   clip_deltas_kernel1  a warp per group: the range once, then all steps of the shrinking range
//   row_dots_kernel1     a warp per row of two contiguous matrices
//   group_maxima_kernel1, relative_parts_kernel1, relative_sums_kernel1
//                        a warp per group; a thread per column and 64 rows; a thread per column
//   round_groups_kernel1, pack_kernel1
//                        a warp per group; a thread per word of the bit stream
// Extremes do not depend on the order; sums run per lane in ascending order, joined as in
// awq_ref.cc, whose lane l adds lane l + half: lane 0 of a shuffle-down tree.
// Assumed (by the callers): width divides columns; matrices named contiguous are.
#include <algorithm>
#include <cstdint>

#include "awq.h"
#include "quantmill/sdk/cuda.hpp"

namespace quantmill::awq {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int64_t kCodeBytes = int64_t{16} << 20;
constexpr unsigned long long kNoBadWeight = ~0ull;

// Blocks of a one-dimensional grid: at most 2^31 - 1, beyond any weight.
unsigned Blocks(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

struct Range {
  float low, high;
};

// Of v(i), i < n, by all lanes of a warp; 0 lies inside.
template <class Value>
__device__ Range WarpRange(int64_t n, int lane, Value&& v) {
  float low = 0.0f, high = 0.0f;
  for (int64_t i = lane; i < n; i += 32) {
    const float x = v(i);
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  for (int half = 16; half > 0; half /= 2) {
    const float other_low = __shfl_xor_sync(kAllLanes, low, half);
    const float other_high = __shfl_xor_sync(kAllLanes, high, half);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
  }
  return {low, high};
}

__device__ inline qm::AffineGroup GroupOf(Range range, const qm::AffineRule& rule) {
  qm::WidenRange(rule.symmetric, &range.low, &range.high);
  return qm::GroupForRange(range.low, range.high, rule);
}

__device__ inline int64_t WarpIndex() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
}

__global__ void __launch_bounds__(kThreads)
    fake_quant_kernel1(Rows w, const float* __restrict__ scale, Rounding rounding, bool difference,
                       float* __restrict__ out) {
  const int64_t width = rounding.width, groups = w.columns / width, item = WarpIndex();
  if (item >= w.count * groups) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = item / groups, first = item % groups * width;
  const float* from = w.data + row * w.stride + first;
  const float* s = scale == nullptr ? nullptr : scale + first;
  float* to = out + row * w.columns + first;
  const auto value = [&](int64_t i) { return s == nullptr ? from[i] : from[i] * s[i]; };
  const qm::AffineGroup group = GroupOf(WarpRange(width, lane, value), rounding.rule);
  const float most = rounding.rule.max_code();
  for (int64_t i = lane; i < width; i += 32) {
    float q = qm::DecodeAffine(qm::EncodeAffine(value(i), group, most), group);
    if (s != nullptr) q = q / s[i];
    to[i] = difference ? q - from[i] : q;
  }
}

__global__ void __launch_bounds__(kThreads)
    clip_deltas_kernel1(Rows w, const float* __restrict__ scale, Rounding rounding, ClipGrid grid,
                        float* __restrict__ delta, float* __restrict__ maximum) {
  const int64_t width = rounding.width, groups = w.columns / width, item = WarpIndex();
  if (item >= w.count * groups) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = item / groups, g = item % groups;
  const float* from = w.data + row * w.stride + g * width;
  const float* s = scale == nullptr ? nullptr : scale + g * width;
  float* to = delta + (g * w.count + row) * grid.steps * width;
  const auto value = [&](int64_t i) { return s == nullptr ? from[i] : from[i] * s[i]; };
  const Range range = WarpRange(width, lane, value);
  const float largest = range.high > -range.low ? range.high : -range.low;
  if (lane == 0) maximum[row * groups + g] = largest;
  const float most = rounding.rule.max_code();
  for (int32_t t = 0; t < grid.steps; ++t, to += width) {
    const float limit = largest * grid.factor(t);
    const Range clipped = {range.low > -limit ? range.low : -limit,
                           range.high < limit ? range.high : limit};
    const qm::AffineGroup group = GroupOf(clipped, rounding.rule);
    for (int64_t i = lane; i < width; i += 32) {
      const float v = value(i);
      float x = v > -limit ? v : -limit;
      x = x < limit ? x : limit;
      const float d = qm::DecodeAffine(qm::EncodeAffine(x, group, most), group) - v;
      to[i] = s == nullptr ? d : d / s[i];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    row_dots_kernel1(const float* __restrict__ a, const float* __restrict__ b, int64_t rows,
                     int64_t columns, float* __restrict__ sums) {
  const int64_t row = WarpIndex();
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  float sum = 0.0f;
  for (int64_t i = lane; i < columns; i += 32) {
    sum += a[row * columns + i] * b[row * columns + i];
  }
  for (int half = 16; half > 0; half /= 2) sum += __shfl_down_sync(kAllLanes, sum, half);
  if (lane == 0) sums[row] = sum;
}

__global__ void __launch_bounds__(kThreads)
    group_maxima_kernel1(Rows w, int64_t width, float* __restrict__ maxima) {
  const int64_t groups = w.columns / width, item = WarpIndex();
  if (item >= w.count * groups) return;
  const int lane = threadIdx.x % 32;
  const float* from = w.data + item / groups * w.stride + item % groups * width;
  const Range range = WarpRange(width, lane, [&](int64_t i) { return from[i]; });
  if (lane == 0) maxima[item] = range.high > -range.low ? range.high : -range.low;
}

// parts: [ceil(rows / kRowsPerSum), columns]; a block: kThreads columns of one part.
__global__ void __launch_bounds__(kThreads)
    relative_parts_kernel1(Rows w, int64_t width, const float* __restrict__ maxima,
                           float* __restrict__ parts) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= w.columns) return;
  const int64_t part_count = (w.count + kRowsPerSum - 1) / kRowsPerSum;
  const int64_t groups = w.columns / width, g = column / width;
  for (int64_t part = blockIdx.y; part < part_count; part += gridDim.y) {
    const int64_t first = part * kRowsPerSum;
    const int64_t last = first + kRowsPerSum < w.count ? first + kRowsPerSum : w.count;
    float sum = 0.0f;
    for (int64_t row = first; row < last; ++row) {
      sum += fabsf(w.data[row * w.stride + column]) / (maxima[row * groups + g] + 1e-6f);
    }
    parts[part * w.columns + column] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    relative_sums_kernel1(const float* __restrict__ parts, int64_t part_count, int64_t columns,
                          double* __restrict__ sums) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= columns) return;
  double sum = sums[column];
  for (int64_t part = 0; part < part_count; ++part) {
    sum += static_cast<double>(parts[part * columns + column]);
  }
  sums[column] = sum;
}

// codes: u8 [rows, in] of a chunk that begins at first_row; scale, zero: [out, groups]; bad: least
// index of a weight that is not finite.
__global__ void __launch_bounds__(kThreads)
    round_groups_kernel1(Rows w, int64_t first_row, qm::AffineShape shape,
                         uint8_t* __restrict__ codes, void* __restrict__ scale,
                         uint8_t* __restrict__ zero, unsigned long long* bad) {
  const int64_t width = shape.group_width(), groups = shape.groups(), item = WarpIndex();
  if (item >= w.count * groups) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = item / groups, g = item % groups;
  const float* from = w.data + row * w.stride + g * width;
  const qm::AffineGroup group =
      GroupOf(WarpRange(width, lane, [&](int64_t i) { return from[i]; }), shape.rule);
  if (lane == 0) {
    const int64_t at = (first_row + row) * groups + g;
    qm::StoreScale(scale, shape.rule.scale_dtype, at, group.scale);
    if (zero != nullptr) zero[at] = static_cast<uint8_t>(group.zero);
  }
  const float most = shape.rule.max_code();
  uint8_t* to = codes + row * shape.in_features + g * width;
  for (int64_t i = lane; i < width; i += 32) {
    const float x = from[i];
    if (!isfinite(x)) {
      atomicMin(bad, static_cast<unsigned long long>((first_row + row) * shape.in_features +
                                                     g * width + i));
    }
    to[i] = static_cast<uint8_t>(qm::EncodeAffine(x, group, most));
  }
}

// codes: u8 [rows, in] -> packed: [rows, words]
__global__ void __launch_bounds__(kThreads)
    pack_kernel1(const uint8_t* __restrict__ codes, int64_t rows, int64_t in_features, int32_t bits,
                 int64_t words, int32_t* __restrict__ packed) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= rows * words) return;
  packed[index] = static_cast<int32_t>(
      qm::PackWord(codes + index / words * in_features, in_features, bits, index % words));
}

int64_t RowsPerChunk(const qm::AffineShape& shape) {
  return std::clamp<int64_t>(kCodeBytes / shape.in_features, 1, shape.out_features);
}

uint64_t Padded(uint64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

qm_status FakeQuantCuda(qm_call* call, const Rows& w, const float* scale, const Rounding& rounding,
                        bool difference, float* out) {
  const int64_t groups = w.columns / rounding.width;
  if (w.count == 0) return QM_OK;
  fake_quant_kernel1<<<Blocks(w.count * groups * 32), kThreads, 0, qm::Stream(call)>>>(
      w, scale, rounding, difference, out);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

qm_status ClipDeltasCuda(qm_call* call, const Rows& w, const float* scale, const Rounding& rounding,
                         const ClipGrid& grid, float* delta, float* maximum) {
  const int64_t groups = w.columns / rounding.width;
  if (w.count == 0) return QM_OK;
  clip_deltas_kernel1<<<Blocks(w.count * groups * 32), kThreads, 0, qm::Stream(call)>>>(
      w, scale, rounding, grid, delta, maximum);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

qm_status RowDotsCuda(qm_call* call, const float* a, const float* b, int64_t rows, int64_t columns,
                      float* sums) {
  if (rows == 0) return QM_OK;
  row_dots_kernel1<<<Blocks(rows * 32), kThreads, 0, qm::Stream(call)>>>(a, b, rows, columns, sums);
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

uint64_t RelativeScratchBytes(int64_t rows, int64_t columns, int64_t width) {
  const int64_t parts = (rows + kRowsPerSum - 1) / kRowsPerSum;
  return Padded(static_cast<uint64_t>(rows * (columns / width)) * sizeof(float)) +
         Padded(static_cast<uint64_t>(parts * columns) * sizeof(float)) +
         Padded(static_cast<uint64_t>(columns) * sizeof(double));
}

qm_status AddRelativeCuda(qm_call* call, const Rows& w, int64_t width, std::vector<double>* sums) {
  if (w.count == 0) return QM_OK;
  const int64_t groups = w.columns / width;
  const int64_t parts = (w.count + kRowsPerSum - 1) / kRowsPerSum;
  const cudaStream_t stream = qm::Stream(call);
  float *maxima = nullptr, *part_sums = nullptr;
  double* totals = nullptr;
  QM_TRY(qm::Scratch(call, call->device, w.count * groups, "group maxima", &maxima));
  QM_TRY(qm::Scratch(call, call->device, parts * w.columns, "channel sums", &part_sums));
  QM_TRY(qm::Scratch(call, call->device, w.columns, "channel sums", &totals));
  const size_t bytes = static_cast<size_t>(w.columns) * sizeof(double);
  QM_CUDA(call, cudaMemcpyAsync(totals, sums->data(), bytes, cudaMemcpyHostToDevice, stream));
  group_maxima_kernel1<<<Blocks(w.count * groups * 32), kThreads, 0, stream>>>(w, width, maxima);
  QM_CUDA(call, cudaGetLastError());
  const dim3 grid(Blocks(w.columns), static_cast<unsigned>(std::min<int64_t>(parts, 65535)));
  relative_parts_kernel1<<<grid, kThreads, 0, stream>>>(w, width, maxima, part_sums);
  QM_CUDA(call, cudaGetLastError());
  relative_sums_kernel1<<<Blocks(w.columns), kThreads, 0, stream>>>(part_sums, parts, w.columns,
                                                                    totals);
  QM_CUDA(call, cudaGetLastError());
  QM_CUDA(call, cudaMemcpyAsync(sums->data(), totals, bytes, cudaMemcpyDeviceToHost, stream));
  QM_CUDA(call, cudaStreamSynchronize(stream));
  return QM_OK;
}

uint64_t RoundScratchBytes(const qm::AffineShape& shape) {
  return Padded(static_cast<uint64_t>(RowsPerChunk(shape) * shape.in_features)) + 256;
}

qm_status RoundCuda(qm_call* call, const qm::AffineShape& shape, qm::TensorView<const float> weight,
                    const qm::AffineTensors& out) {
  const cudaStream_t stream = qm::Stream(call);
  const int64_t words = qm::AffineWordsPerRow(shape.in_features, shape.rule.bits);
  const int64_t rows_per_chunk = RowsPerChunk(shape);
  uint8_t* codes = nullptr;
  unsigned long long* bad = nullptr;
  QM_TRY(qm::Scratch(call, call->device, rows_per_chunk * shape.in_features, "codes", &codes));
  QM_TRY(qm::Scratch(call, call->device, 1, "the finiteness check", &bad));
  QM_CUDA(call, cudaMemsetAsync(bad, 0xFF, sizeof *bad, stream));
  for (int64_t row = 0; row < shape.out_features; row += rows_per_chunk) {
    QM_TRY(qm::Progress(call, static_cast<double>(row) / static_cast<double>(shape.out_features)));
    const int64_t rows = std::min(rows_per_chunk, shape.out_features - row);
    const Rows w = {weight.row(row), rows, shape.in_features, weight.stride(0)};
    round_groups_kernel1<<<Blocks(rows * shape.groups() * 32), kThreads, 0, stream>>>(
        w, row, shape, codes, out.scale.data, static_cast<uint8_t*>(out.zero.data), bad);
    QM_CUDA(call, cudaGetLastError());
    pack_kernel1<<<Blocks(rows * words), kThreads, 0, stream>>>(
        codes, rows, shape.in_features, shape.rule.bits, words,
        static_cast<int32_t*>(out.codes.data) + row * words);
    QM_CUDA(call, cudaGetLastError());
  }
  unsigned long long first_bad = kNoBadWeight;
  QM_CUDA(call, cudaMemcpyAsync(&first_bad, bad, sizeof first_bad, cudaMemcpyDeviceToHost, stream));
  QM_CUDA(call, cudaStreamSynchronize(stream));
  if (first_bad == kNoBadWeight) return QM_OK;
  const int64_t index = static_cast<int64_t>(first_bad);
  return qm::NotFinite(call, index / shape.in_features, index % shape.in_features);
}

}  // namespace quantmill::awq
