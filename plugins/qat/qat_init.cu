// Where training starts, on the GPU; the same bits as qat_ref.cc (compiled with --fmad=false).
//
//   search_kernel1   weight [out, in] -> parameters [out, groups]: one warp per group, the range of
//                    least squared error
//   grid_kernel1     scale, zero of the base [out, groups] -> parameters: one thread per group
//   start_kernel1    weight, codes of the base -> weights inside the base's cells [out, in]: one
//                    thread per weight
// Assumed: rows of the weight are contiguous, every other matrix as a whole.
#include <cstdint>

#include "qat.h"
#include "quantmill/sdk/affine_search.cuh"
#include "quantmill/sdk/cuda.hpp"

namespace quantmill::qat {
namespace {

constexpr int kThreads = 128;
constexpr unsigned long long kNone = ~0ull;

__device__ void NoteIfNotFinite(float w, int64_t index, unsigned long long* bad) {
  if (!isfinite(w)) atomicMin(bad, static_cast<unsigned long long>(index));
}

template <int kCached>
__global__ void __launch_bounds__(kThreads)
    search_kernel1(const float* __restrict__ weight, int64_t row_stride, qm::AffineShape shape,
                   FreshParameters out, unsigned long long* bad) {
  const int64_t width = shape.group_width(), groups = shape.groups();
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (index >= shape.out_features * groups) return;
  const int64_t row = index / groups, g = index % groups;
  const qm::WarpGroup<kCached> values(weight + row * row_stride + g * width, width);
  const qm::AffineSearch search = {qm::AffineClip::kSquaredError};
  const qm::AffineGroup group = qm::WarpFindAffineGroup(values, shape.rule, search);
  values.ForEachIndexed([&](float x, int64_t i) {
    NoteIfNotFinite(x, row * shape.in_features + g * width + i, bad);
  });
  if (threadIdx.x % 32 != 0) return;
  out.factor[index] = 1.0f;
  out.scale_init[index] = group.scale;
  if (out.zero != nullptr) out.zero[index] = group.zero;
}

// bad: least index of a group whose scale or zero point cannot be used.
__global__ void __launch_bounds__(kThreads)
    grid_kernel1(Base base, qm::AffineRule rule, int64_t groups, FreshParameters out,
                 unsigned long long* bad) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= groups) return;
  const float max_code = rule.max_code();
  const float scale = qm::LoadScale(base.scale, base.scale_dtype, index);
  float zero = 0.5f * (max_code + 1.0f);
  if (base.zero != nullptr) {
    zero = base.zero_dtype == QM_U8
               ? static_cast<float>(static_cast<const uint8_t*>(base.zero)[index])
               : qm::LoadScale(base.zero, base.zero_dtype, index);
  }
  if (!(scale > 0.0f && isfinite(scale) && isfinite(zero))) {
    atomicMin(bad, static_cast<unsigned long long>(index));
  }
  zero = zero > 0.0f ? zero : 0.0f;
  zero = zero < max_code ? zero : max_code;
  out.factor[index] = 1.0f;
  out.scale_init[index] = qm::RoundScale(scale, rule.scale_dtype);
  if (out.zero != nullptr) out.zero[index] = qm::RoundHalfEven(zero);
}

// After grid_kernel1. start may be null: then weights are only checked.
__global__ void __launch_bounds__(kThreads)
    start_kernel1(const float* __restrict__ weight, int64_t row_stride, qm::AffineShape shape,
                  const int32_t* __restrict__ codes, Parameters params, float* __restrict__ start,
                  unsigned long long* bad) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= shape.out_features * shape.in_features) return;
  const int64_t row = at / shape.in_features, i = at % shape.in_features;
  const float w = weight[row * row_stride + i];
  NoteIfNotFinite(w, at, bad);
  if (start == nullptr) return;
  const int32_t* packed = codes + row * qm::AffineWordsPerRow(shape.in_features, shape.rule.bits);
  const float code = static_cast<float>(qm::UnpackCode(packed, shape.rule.bits, i));
  const int64_t index = row * shape.groups() + i / shape.group_width();
  start[at] = InsideCell(w, code, GridOf(params, shape.rule, index));
}

unsigned Blocks(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

// Two counters: a weight, a group.
qm_status NewCounters(qm_call* call, unsigned long long** out) {
  QM_TRY(qm::Scratch(call, call->device, 2, "the finiteness check", out));
  QM_CUDA(call, cudaMemsetAsync(*out, 0xFF, 2 * sizeof **out, qm::Stream(call)));
  return QM_OK;
}

// Waits for the stream and turns the counters into an error.
qm_status ReadCounters(qm_call* call, const qm::AffineShape& shape,
                       const unsigned long long* counters) {
  unsigned long long seen[2] = {kNone, kNone};
  QM_CUDA(call,
          cudaMemcpyAsync(seen, counters, sizeof seen, cudaMemcpyDeviceToHost, qm::Stream(call)));
  QM_CUDA(call, cudaStreamSynchronize(qm::Stream(call)));
  if (seen[1] != kNone) return DamagedBase(call, shape, static_cast<int64_t>(seen[1]));
  if (seen[0] == kNone) return QM_OK;
  const int64_t index = static_cast<int64_t>(seen[0]);
  return qm::NotFinite(call, index / shape.in_features, index % shape.in_features);
}

}  // namespace

qm_status InitFromWeightCuda(qm_call* call, const qm::AffineShape& shape,
                             qm::TensorView<const float> weight, const FreshParameters& out) {
  unsigned long long* counters = nullptr;
  QM_TRY(NewCounters(call, &counters));
  const int64_t width = shape.group_width(), groups = shape.out_features * shape.groups();
  const auto kernel = width <= 128   ? search_kernel1<4>
                      : width <= 256 ? search_kernel1<8>
                                     : search_kernel1<0>;
  kernel<<<Blocks(groups * 32), kThreads, 0, qm::Stream(call)>>>(weight.data(), weight.stride(0),
                                                                 shape, out, counters);
  QM_CUDA(call, cudaGetLastError());
  return ReadCounters(call, shape, counters);
}

qm_status InitFromBaseCuda(qm_call* call, const qm::AffineShape& shape,
                           qm::TensorView<const float> weight, const Base& base,
                           const FreshParameters& out, float* start) {
  unsigned long long* counters = nullptr;
  QM_TRY(NewCounters(call, &counters));
  const int64_t groups = shape.out_features * shape.groups();
  grid_kernel1<<<Blocks(groups), kThreads, 0, qm::Stream(call)>>>(base, shape.rule, groups, out,
                                                                  counters + 1);
  QM_CUDA(call, cudaGetLastError());
  const Parameters params = {out.factor, out.scale_init, out.zero};
  start_kernel1<<<Blocks(shape.out_features * shape.in_features), kThreads, 0, qm::Stream(call)>>>(
      weight.data(), weight.stride(0), shape, base.codes, params, start, counters);
  QM_CUDA(call, cudaGetLastError());
  return ReadCounters(call, shape, counters);
}

}  // namespace quantmill::qat
