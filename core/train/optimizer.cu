// What an optimizer does to all parameters of a model at once:
//
//   norm     sum of x^2 over many tensors, for clipping
//   AdamW    g = gradient gradient_scale;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
//            p = keep p - rate m / (sqrt(v) root + epsilon)     (factors: FactorsOf)
//            average = average_keep average + average_rest p  (where a mean is kept)
//            stored = p rounded, gradient = 0
//
// All f32 but `stored`. CPU references: SquaresOf and Update of cpu_ops.cc.
//
// Work: a launch takes as many tensors as fit the arguments of a kernel, which need no memory and
// no copy. Every tensor is cut into chunks of a fixed size, one per block; a block finds its tensor
// by the chunks before it. Squares: one partial sum in f64 per chunk, whose place depends on the
// tensors' sizes alone; one block adds them in order. AdamW is element-wise: 34 bytes per element
// with a 16-bit `stored`, 42 with a mean, bound by memory.
//
// Versions
//   1  one tensor per launch, 512 blocks that stride over it
//   2  many tensors per launch, rounding and zeroing included (in use): a whole step of 19 M
//      parameters takes 0.28 ms without means, 0.35 ms with them (H200, 2026-11-29)
#include "core/cuda/kernel_common.cuh"
#include "core/train/backward_kernels.cuh"

namespace quantmill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 32 * kThreads;

// Items of one launch; item i has chunks [first_chunk[i], first_chunk[i + 1]) of the launch.
template <typename Item, int kItems>
struct Batch {
  Item items[kItems];
  int64_t first_chunk[kItems + 1];
  int count;
};
using SquaresBatch = Batch<SquaresItem, 128>;
using AdamWBatch = Batch<AdamWItem, 32>;
// What kernels of any CUDA version take as arguments.
static_assert(sizeof(SquaresBatch) + 16 <= 4096 && sizeof(AdamWBatch) <= 4096);

// The item of a block's chunk, and the elements [*begin, *end) of it.
template <typename B>
__device__ __forceinline__ int ItemOfBlock(const B& batch, int64_t* begin, int64_t* end) {
  int item = 0;
  while (item + 1 < batch.count && batch.first_chunk[item + 1] <= blockIdx.x) ++item;
  *begin = (blockIdx.x - batch.first_chunk[item]) * kChunk;
  const int64_t count = batch.items[item].count;
  *end = *begin + kChunk < count ? *begin + kChunk : count;
  return item;
}

__global__ void PartialSquaresKernel2(const __grid_constant__ SquaresBatch batch, double* partial) {
  __shared__ double scratch[kThreads / kWarpSize];
  int64_t begin, end;
  const float* x = batch.items[ItemOfBlock(batch, &begin, &end)].x;
  double sum = 0;
#pragma unroll 8
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const double value = x[i];
    sum += value * value;
  }
  sum = BlockSum(sum, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void TotalKernel1(const double* partial, int64_t count, double* total) {
  __shared__ double scratch[kThreads / kWarpSize];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = BlockSum(sum, scratch);
  if (threadIdx.x == 0) *total = sum;
}

__device__ __forceinline__ void Store(void* data, DType dtype, int64_t i, float value) {
  if (dtype == DType::kF32) {
    static_cast<float*>(data)[i] = value;
  } else if (dtype == DType::kF16) {
    static_cast<__half*>(data)[i] = FromFloat<__half>(value);
  } else {
    static_cast<__nv_bfloat16*>(data)[i] = FromFloat<__nv_bfloat16>(value);
  }
}

__global__ void AdamWKernel2(const __grid_constant__ AdamWBatch batch) {
  int64_t begin, end;
  const AdamWItem& item = batch.items[ItemOfBlock(batch, &begin, &end)];
  const AdamWFactors f = item.factors;
  float* __restrict__ gradient = item.gradient;
  float* __restrict__ p = item.p;
  float* __restrict__ first = item.first;
  float* __restrict__ second = item.second;
  float* __restrict__ average = item.average;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const float g = gradient[i] * f.gradient_scale;
    const float m = f.beta1 * first[i] + f.rest1 * g;
    const float v = f.beta2 * second[i] + f.rest2 * g * g;
    const float value = p[i] * f.keep - f.rate * m / (sqrtf(v) * f.root + f.epsilon);
    gradient[i] = 0;
    first[i] = m;
    second[i] = v;
    p[i] = value;
    if (average != nullptr) average[i] = f.average_keep * average[i] + f.average_rest * value;
    Store(item.stored, item.stored_dtype, i, value);
  }
}

// Calls launch(batch, chunks) for the items in order, as many at once as a batch holds.
template <typename B, typename Item, typename Launch>
cudaError_t ForBatches(absl::Span<const Item> items, const Launch& launch) {
  constexpr size_t kItems = std::size(B{}.items);
  size_t next = 0;
  while (next < items.size()) {
    B batch = {};
    int64_t chunks = 0;
    for (; next < items.size() && static_cast<size_t>(batch.count) < kItems; ++next) {
      if (items[next].count == 0) continue;
      batch.items[batch.count] = items[next];
      batch.first_chunk[batch.count] = chunks;
      chunks += CeilDiv(items[next].count, kChunk);
      batch.first_chunk[++batch.count] = chunks;
    }
    if (chunks == 0) continue;
    launch(batch, chunks);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

int64_t SquarePartials(absl::Span<const SquaresItem> items) {
  int64_t chunks = 0;
  for (const SquaresItem& item : items) chunks += CeilDiv(item.count, kChunk);
  return chunks;
}

cudaError_t LaunchSumOfSquares(absl::Span<const SquaresItem> items, double* partial, double* total,
                               cudaStream_t stream) {
  int64_t done = 0;
  const cudaError_t error =
      ForBatches<SquaresBatch>(items, [&](const SquaresBatch& batch, int64_t chunks) {
        PartialSquaresKernel2<<<static_cast<unsigned>(chunks), kThreads, 0, stream>>>(
            batch, partial + done);
        done += chunks;
      });
  if (error != cudaSuccess) return error;
  TotalKernel1<<<1, kThreads, 0, stream>>>(partial, done, total);
  return cudaGetLastError();
}

cudaError_t LaunchAdamW(absl::Span<const AdamWItem> items, cudaStream_t stream) {
  return ForBatches<AdamWBatch>(items, [&](const AdamWBatch& batch, int64_t chunks) {
    AdamWKernel2<<<static_cast<unsigned>(chunks), kThreads, 0, stream>>>(batch);
  });
}

}  // namespace quantmill::cuda
