// HQQ on the GPU, a layer in one kernel; the same bits as hqq_ref.cc (compiled with --fmad=false).
//
// The steps are those of hqq_ref.cc, with a barrier over the grid between them (the launch is
// cooperative):
//   1. scale and low of every group; bytes of scales: a warp per block of 128
//   2. errors of all iterations, a warp per tile of 32 groups, kept in shared memory
//   3. a block per iteration adds up the tiles, then every block finds the last iteration
//   4. the iterations again, up to that one; zero points, as bytes after their range is known
//   5. a thread per 32-bit word of the codes
//
// Axis 1: the lanes of a warp share a group (element i in lane i % 32, sums joined by a butterfly,
// which adds the pairs of JoinLanes); the weights of a group are read again each iteration, from
// L1. Axis 0: a lane per group, so that a warp reads 32 neighbouring weights of a row.
//
// weight: f32 [out, in], rows contiguous. scale, zero: f32 [groups] in scratch; errors: f64
// [tiles, iterations]; totals: f64 [iterations].
#include <cooperative_groups.h>

#include <algorithm>
#include <limits>

#include "hqq_math.h"
#include "quantmill/sdk/affine_search.hpp"
#include "quantmill/sdk/cuda.hpp"

namespace quantmill::hqq {
namespace {

constexpr int kThreads = 128;  // also the number of partial sums in step 3
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr unsigned long long kNoBadWeight = ~0ull;
static_assert(kThreads == kTotalLanes);

// What the blocks share.
struct Shared {
  unsigned long long bad;  // least index of a weight that is not finite
  uint32_t lowest_zero;    // as ordered keys
  uint32_t highest_zero;
};

struct Arguments {
  Options options;
  const float* weight;
  int64_t row_stride;
  const Step* steps;
  float* scale;
  float* zero;
  double* errors;
  double* totals;
  Shared* shared;
  void* scale_out;
  void* zero_out;
  float* scale_range;
  float* zero_range;
  int32_t* codes;
};

template <class T>
__device__ T JoinWarp(T value) {
  for (int half = 16; half > 0; half /= 2) value += __shfl_xor_sync(kAllLanes, value, half);
  return value;
}

// The weights of group j: element i at first[i * stride].
struct GroupWeights {
  const float* first;
  int64_t stride;
};
__device__ inline GroupWeights WeightsOf(const Arguments& a, int64_t j) {
  const Options& o = a.options;
  const int64_t columns = o.scale_columns();
  const float* row = a.weight + j / columns * a.row_stride;
  if (o.axis == 1) return {row + j % columns * o.group_size, 1};
  return {row + j % columns, o.scale_rows() * a.row_stride};
}

__device__ inline void ReportBad(const Arguments& a, const float* at) {
  const int64_t offset = at - a.weight;
  atomicMin(&a.shared->bad,
            static_cast<unsigned long long>(offset / a.row_stride * a.options.in_features +
                                            offset % a.row_stride));
}

// Step 1. A thread per group for axis 0, a warp per group for axis 1.
__device__ void StartGroups(const Arguments& a, int64_t warp, int64_t warps, int lane) {
  const Options& o = a.options;
  for (int64_t tile = warp; tile < o.tiles(); tile += warps) {
    for (int g = 0; g < (o.axis == 1 ? kTileGroups : 1); ++g) {
      const int64_t j = tile * kTileGroups + (o.axis == 1 ? g : lane);
      if (j >= o.groups()) break;
      const GroupWeights w = WeightsOf(a, j);
      float low = w.first[0], high = low;
      for (int64_t i = o.axis == 1 ? lane : 0; i < o.group_size; i += o.axis == 1 ? 32 : 1) {
        const float x = w.first[i * w.stride];
        if (!isfinite(x)) ReportBad(a, w.first + i * w.stride);
        low = x < low ? x : low;
        high = x > high ? x : high;
      }
      if (o.axis == 1) {
        for (int half = 16; half > 0; half /= 2) {
          const float other_low = __shfl_xor_sync(kAllLanes, low, half);
          const float other_high = __shfl_xor_sync(kAllLanes, high, half);
          low = other_low < low ? other_low : low;
          high = other_high > high ? other_high : high;
        }
      }
      const Start start = StartOfGroup(low, high, o);
      if (o.axis == 0 || lane == 0) {
        a.scale[j] = start.scale;
        a.zero[j] = start.low;
        if (!o.quantize_scale) qm::StoreScale(a.scale_out, o.scale_dtype, j, start.scale);
      }
    }
  }
}

__device__ void QuantizeScales(const Arguments& a, int64_t warp, int64_t warps, int lane) {
  const Options& o = a.options;
  for (int64_t b = warp; b < o.scale_blocks(); b += warps) {
    const int64_t begin = b * kScaleBlock;
    const int64_t left = o.groups() - begin;
    const int64_t end = begin + (left < kScaleBlock ? left : kScaleBlock);
    float low = a.scale[begin], high = low;
    for (int64_t j = begin + lane; j < end; j += 32) {
      low = fminf(low, a.scale[j]);
      high = fmaxf(high, a.scale[j]);
    }
    for (int half = 16; half > 0; half /= 2) {
      low = fminf(low, __shfl_xor_sync(kAllLanes, low, half));
      high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, half));
    }
    const Range range = ByteRange(low, high);
    if (lane == 0) {
      a.scale_range[2 * b] = range.step;
      a.scale_range[2 * b + 1] = range.offset;
    }
    for (int64_t j = begin + lane; j < end; j += 32) {
      const uint8_t byte = ToByte(a.scale[j], range);
      static_cast<uint8_t*>(a.scale_out)[j] = byte;
      a.scale[j] = FromByte(byte, range);
    }
  }
}

// One iteration over a group by the threads that share it: first, first + step, ... of its weights.
struct Sums {
  float error, zero;
};
__device__ inline Sums Iterate(const GroupWeights& w, int64_t n, int64_t first, int64_t stride,
                               const Group& g, const Step& step, float norm, float max_code) {
  Sums sums = {0.0f, 0.0f};
  for (int64_t i = first; i < n; i += stride) {
    const float x = w.first[i * w.stride];
    const float q = Encode(x, g, max_code);
    const float r = x - (q - g.zero) * g.scale;
    sums.error += r < 0.0f ? -r : r;
    sums.zero += q - (x - Shrink(r, step, norm)) * g.inverse;
  }
  return sums;
}

// Steps 2 and 4 for a tile: `count` iterations; errors (of this warp, in shared memory) or null.
__device__ void SolveTile(const Arguments& a, int64_t tile, int lane, int count, double* errors) {
  const Options& o = a.options;
  const bool rows = o.axis == 1;
  const float n = static_cast<float>(o.group_size), max_code = o.max_code();
  for (int index = 0; index < (rows ? kTileGroups : 1); ++index) {
    const int64_t j = tile * kTileGroups + (rows ? index : lane);
    const bool used = j < o.groups();
    if (rows && !used) break;
    const GroupWeights w = WeightsOf(a, used ? j : 0);
    const int64_t size = used ? o.group_size : 0;
    Group g = {used ? a.scale[j] : 1.0f, 0.0f, 0.0f};
    g.inverse = 1.0f / g.scale;
    g.zero = used ? FirstZero(a.zero[j], g.inverse) : 0.0f;
    for (int t = 0; t < count; ++t) {
      Sums sums = Iterate(w, size, rows ? lane : 0, rows ? 32 : 1, g, a.steps[t], o.norm, max_code);
      if (rows) sums = {JoinWarp(sums.error), JoinWarp(sums.zero)};
      if (errors != nullptr) {
        const double error =
            rows ? static_cast<double>(sums.error) : JoinWarp(static_cast<double>(sums.error));
        if (lane == 0) errors[t] += error;
      }
      g.zero = BoundZero(sums.zero / n);
    }
    if (errors == nullptr && used && (!rows || lane == 0)) a.zero[j] = g.zero;
  }
}

__device__ void TileErrors(const Arguments& a, int64_t warp, int64_t warps, int lane,
                           double* mine) {
  const Options& o = a.options;
  for (int64_t tile = warp; tile < o.tiles(); tile += warps) {
    for (int t = lane; t < o.iterations; t += 32) mine[t] = 0.0;
    __syncwarp();
    SolveTile(a, tile, lane, o.iterations, mine);
    __syncwarp();
    for (int t = lane; t < o.iterations; t += 32) a.errors[tile * o.iterations + t] = mine[t];
    __syncwarp();
  }
}

// Step 3, first half: totals of the iterations this block has.
__device__ void Totals(const Arguments& a, double* lanes) {
  const Options& o = a.options;
  for (int t = blockIdx.x; t < o.iterations; t += gridDim.x) {
    double sum = 0.0;
    for (int64_t tile = threadIdx.x; tile < o.tiles(); tile += kTotalLanes) {
      sum += a.errors[tile * o.iterations + t];
    }
    lanes[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kTotalLanes / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) a.totals[t] = lanes[0];
    __syncthreads();
  }
}

__device__ int IterationsToRun(const Arguments& a) {
  double best = INFINITY;
  for (int t = 0; t < a.options.iterations; ++t) {
    if (!(a.totals[t] < best)) return t + 1;
    best = a.totals[t];
  }
  return a.options.iterations;
}

// Ends step 4 for zero points that are stored as floats, and finds the range of the others.
__device__ void FinishZero(const Arguments& a, int64_t thread, int64_t threads) {
  const Options& o = a.options;
  for (int64_t j = thread; j < o.groups(); j += threads) {
    if (o.quantize_zero) {
      const uint32_t key = qm::OrderedKey(a.zero[j]);
      atomicMin(&a.shared->lowest_zero, key);
      atomicMax(&a.shared->highest_zero, key);
    } else {
      a.zero[j] = RoundZero(a.zero[j], o.scale_dtype);
      qm::StoreScale(a.zero_out, o.scale_dtype, j, a.zero[j]);
    }
  }
}

__device__ void QuantizeZeros(const Arguments& a, int64_t thread, int64_t threads) {
  const Range range = ByteRange(qm::FromOrderedKey(a.shared->lowest_zero),
                                qm::FromOrderedKey(a.shared->highest_zero));
  if (thread == 0) {
    a.zero_range[0] = range.step;
    a.zero_range[1] = range.offset;
  }
  for (int64_t j = thread; j < a.options.groups(); j += threads) {
    const uint8_t byte = ToByte(a.zero[j], range);
    static_cast<uint8_t*>(a.zero_out)[j] = byte;
    a.zero[j] = FromByte(byte, range);
  }
}

// Step 5. A code that crosses a word boundary is computed for both.
__device__ void EncodeWords(const Arguments& a, int64_t thread, int64_t threads) {
  const Options& o = a.options;
  const int64_t words = o.words();
  const float max_code = o.max_code();
  for (int64_t index = thread; index < o.out_features * words; index += threads) {
    const int64_t row = index / words, first_bit = index % words * 32;
    const float* w = a.weight + row * a.row_stride;
    uint32_t value = 0;
    for (int64_t i = first_bit / o.bits; i < o.in_features && i * o.bits < first_bit + 32; ++i) {
      const int64_t j = o.GroupOf(row, i);
      const Group g = {a.scale[j], 1.0f / a.scale[j], a.zero[j]};
      const uint32_t code = static_cast<uint32_t>(Encode(w[i], g, max_code));
      const int64_t shift = i * o.bits - first_bit;
      value |= shift >= 0 ? code << shift : code >> -shift;
    }
    a.codes[index] = static_cast<int32_t>(value);
  }
}

// Dynamic shared memory: f64 [kWarps, iterations], at least kTotalLanes of them.
__global__ void __launch_bounds__(kThreads) hqq_kernel1(Arguments a) {
  extern __shared__ double room[];
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int lane = threadIdx.x % 32;
  const int64_t warp = thread / 32, warps = threads / 32;

  StartGroups(a, warp, warps, lane);
  grid.sync();
  if (a.shared->bad != kNoBadWeight) return;  // the same answer in every block
  if (a.options.quantize_scale) {
    QuantizeScales(a, warp, warps, lane);
    grid.sync();
  }
  TileErrors(a, warp, warps, lane, room + threadIdx.x / 32 * a.options.iterations);
  grid.sync();
  Totals(a, room);
  grid.sync();
  const int count = IterationsToRun(a);
  for (int64_t tile = warp; tile < a.options.tiles(); tile += warps) {
    SolveTile(a, tile, lane, count, nullptr);
  }
  grid.sync();
  FinishZero(a, thread, threads);
  grid.sync();
  if (a.options.quantize_zero) {
    QuantizeZeros(a, thread, threads);
    grid.sync();
  }
  EncodeWords(a, thread, threads);
}

size_t SharedBytes(const Options& o) {
  return sizeof(double) * static_cast<size_t>(std::max(kTotalLanes, kWarps * o.iterations));
}

// As many blocks as fit on the device at once, and no more than there is work for.
qm_status GridSize(qm_call* call, const Options& o, int* blocks) {
  int processors = 0, per_processor = 0;
  QM_CUDA(call,
          cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, call->device.index));
  QM_CUDA(call, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, hqq_kernel1, kThreads,
                                                              SharedBytes(o)));
  const int64_t useful = std::max((o.tiles() + kWarps - 1) / kWarps,
                                  (o.out_features * o.words() + kThreads - 1) / kThreads);
  *blocks = static_cast<int>(std::min<int64_t>(useful, int64_t{processors} * per_processor));
  return QM_OK;
}

qm_status Prepare(qm_call* call, const std::vector<Step>& steps, Arguments* a) {
  const Options& o = a->options;
  const cudaStream_t stream = qm::Stream(call);
  const int64_t iterations = std::max(o.iterations, 1);
  Step* device_steps = nullptr;
  QM_TRY(qm::Scratch(call, call->device, iterations, "the steps", &device_steps));
  QM_TRY(qm::Scratch(call, call->device, o.groups(), "scales", &a->scale));
  QM_TRY(qm::Scratch(call, call->device, o.groups(), "zero points", &a->zero));
  QM_TRY(qm::Scratch(call, call->device, o.tiles() * iterations, "errors", &a->errors));
  QM_TRY(qm::Scratch(call, call->device, iterations, "errors", &a->totals));
  QM_TRY(qm::Scratch(call, call->device, 1, "the finiteness check", &a->shared));
  a->steps = device_steps;
  const Shared start = {kNoBadWeight, ~0u, 0u};
  QM_CUDA(call, cudaMemcpyAsync(a->shared, &start, sizeof start, cudaMemcpyHostToDevice, stream));
  if (steps.empty()) return QM_OK;
  QM_CUDA(call, cudaMemcpyAsync(device_steps, steps.data(), steps.size() * sizeof(Step),
                                cudaMemcpyHostToDevice, stream));
  return QM_OK;
}

qm_status HqqLaunch(qm_call* call, Arguments* a) {
  int blocks = 0;
  QM_TRY(GridSize(call, a->options, &blocks));
  void* arguments[] = {a};
  QM_CUDA(call, cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(&hqq_kernel1),
                                            dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                                            arguments, SharedBytes(a->options), qm::Stream(call)));
  return QM_OK;
}

}  // namespace

uint64_t CudaScratchBytes(const Options& o) {
  const auto padded = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  const int64_t iterations = std::max(o.iterations, 1);
  return static_cast<uint64_t>(2 * padded(o.groups() * 4) + padded(o.tiles() * iterations * 8) +
                               2 * padded(iterations * 8) + padded(sizeof(Shared)));
}

qm_status QuantizeCuda(qm_call* call, const Options& options, const std::vector<Step>& steps,
                       qm::TensorView<const float> weight, const Result& out) {
  Arguments a = {};
  a.options = options;
  a.weight = weight.data();
  // A single row may come with any stride.
  a.row_stride = options.out_features > 1 ? weight.stride(0) : options.in_features;
  a.scale_out = out.scale.data;
  a.zero_out = out.zero.data;
  a.scale_range = static_cast<float*>(out.scale_range.data);
  a.zero_range = static_cast<float*>(out.zero_range.data);
  a.codes = static_cast<int32_t*>(out.codes.data);
  QM_TRY(Prepare(call, steps, &a));
  QM_TRY(qm::Progress(call, 0.0));
  QM_TRY(HqqLaunch(call, &a));
  Shared result = {};
  const cudaStream_t stream = qm::Stream(call);
  QM_CUDA(call, cudaMemcpyAsync(&result, a.shared, sizeof result, cudaMemcpyDeviceToHost, stream));
  QM_CUDA(call, cudaStreamSynchronize(stream));
  if (result.bad == kNoBadWeight) return QM_OK;
  const int64_t index = static_cast<int64_t>(result.bad);
  return qm::NotFinite(call, index / options.in_features, index % options.in_features);
}

}  // namespace quantmill::hqq
