// NF4 and FP4 on the GPU; nf4_ref.cc is the same on the CPU, with the same bits.
//
//   codes   kernel 1: a warp per block of B weights of the flat row-major weight f32 [out, in].
//           Lane l takes pairs l, l + 32, ...: two weights, one byte. Largest magnitude by
//           shuffles, then codes of w * (1 / absmax). Reads 4 bytes a weight (twice, the second
//           time from cache), writes half a byte.
//   mean    kernel 2, double quantization: one block of 256 threads; thread k sums factors
//           k, k + 256, ... in f64, joined pairwise.
//   bytes   kernel 3: a block of 256 threads per nested block of 256 factors: range, then the
//           nearest of 256 values by binary search.
//
// Assumptions: B is a power of two, 32 .. 4096; rows of the weight are contiguous. The arithmetic
// is that of nf4_math.h, compiled without contraction. Versions: 1 as described.
#include <algorithm>

#include "nf4_cuda.h"
#include "nf4_math.h"
#include "quantmill/sdk/affine_int.hpp"
#include "quantmill/sdk/cuda.hpp"

namespace quantmill::nf4 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned long long kNoBadWeight = ~0ull;

static_assert(kMeanLanes == kThreads && kNestedBlock == kThreads);

// A flat weight whose rows are `row_stride` apart.
struct FlatWeight {
  const float* data;
  int64_t columns, row_stride, count;

  __device__ float At(int64_t i) const {
    return row_stride == columns ? data[i] : data[i / columns * row_stride + i % columns];
  }
};

__device__ float WarpMax(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, offset));
  }
  return x;
}

// bad: least flat index of a weight that is NaN or infinite.
template <bool kFp4>
__global__ void __launch_bounds__(kThreads)
    nf4_kernel1(FlatWeight w, int64_t block_size, float* absmax, uint8_t* codes,
                unsigned long long* bad) {
  const int lane = threadIdx.x % 32;
  const int64_t blocks = (w.count + block_size - 1) / block_size;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; b < blocks;
       b += warps) {
    const int64_t begin = b * block_size;
    const int64_t end = begin + block_size < w.count ? begin + block_size : w.count;
    float largest = 0.0f;
    for (int64_t i = begin + lane; i < end; i += 32) {
      const float x = w.At(i);
      if (!isfinite(x)) atomicMin(bad, static_cast<unsigned long long>(i));
      largest = fmaxf(largest, Magnitude(x));  // of a NaN, the other
    }
    largest = WarpMax(largest);
    if (lane == 0) absmax[b] = largest;
    const float inverse = InverseAbsmax(largest);
    for (int64_t i = begin + 2 * lane; i < end; i += 64) {
      const uint32_t high = Encode(w.At(i) * inverse, kFp4);
      const uint32_t low = i + 1 < end ? Encode(w.At(i + 1) * inverse, kFp4)
                                       : static_cast<uint32_t>(kFp4 ? kFp4Zero : kNf4Zero);
      codes[i / 2] = static_cast<uint8_t>(high << 4 | low);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    nf4_mean_kernel1(const float* absmax, int64_t count, float* mean) {
  __shared__ double lanes[kThreads];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += static_cast<double>(absmax[i]);
  lanes[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) *mean = static_cast<float>(lanes[0] / static_cast<double>(count));
}

__global__ void __launch_bounds__(kThreads)
    nf4_bytes_kernel1(const float* absmax, int64_t count, const float* mean, const float* codebook,
                      float* ranges, uint8_t* bytes) {
  __shared__ float largest[kThreads];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const float offset = *mean;
  const float factor = i < count ? absmax[i] : offset;
  largest[threadIdx.x] = Magnitude(factor - offset);
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      largest[threadIdx.x] = fmaxf(largest[threadIdx.x], largest[threadIdx.x + half]);
    }
    __syncthreads();
  }
  const float range = largest[0];
  if (threadIdx.x == 0) ranges[blockIdx.x] = range;
  if (i < count) bytes[i] = EncodeAbsmax(codebook, factor, offset, range);
}

qm_status EncodeFactors(qm_call* call, const float* absmax, int64_t blocks, const Result& out) {
  const cudaStream_t stream = qm::Stream(call);
  float* mean = static_cast<float*>(out.absmax_offset.data);
  nf4_mean_kernel1<<<1, kThreads, 0, stream>>>(absmax, blocks, mean);
  QM_CUDA(call, cudaGetLastError());
  const unsigned nested = static_cast<unsigned>((blocks + kNestedBlock - 1) / kNestedBlock);
  nf4_bytes_kernel1<<<nested, kThreads, 0, stream>>>(
      absmax, blocks, mean, static_cast<const float*>(out.nested_codebook.data),
      static_cast<float*>(out.nested_absmax.data), static_cast<uint8_t*>(out.absmax.data));
  QM_CUDA(call, cudaGetLastError());
  return QM_OK;
}

}  // namespace

qm_status CopyToDevice(qm_call* call, const float* values, int64_t count, const qm_tensor& out) {
  QM_CUDA(call, cudaMemcpyAsync(out.data, values, static_cast<size_t>(count) * sizeof(float),
                                cudaMemcpyHostToDevice, qm::Stream(call)));
  return QM_OK;
}

uint64_t CudaScratchBytes(const Params& p, int64_t weights) {
  return 512 + (p.nested_block_size == 0 ? 0 : static_cast<uint64_t>(p.Blocks(weights)) * 4 + 256);
}

qm_status QuantizeCuda(qm_call* call, const Params& p, qm::TensorView<const float> weight,
                       const Result& out) {
  const cudaStream_t stream = qm::Stream(call);
  FlatWeight flat = {weight.data(), weight.shape(1), weight.stride(0),
                     weight.shape(0) * weight.shape(1)};
  if (weight.shape(0) == 1) flat.row_stride = flat.columns;  // a single row may have any stride
  unsigned long long* bad = nullptr;
  QM_TRY(qm::Scratch(call, call->device, 1, "the finiteness check", &bad));
  QM_CUDA(call, cudaMemsetAsync(bad, 0xFF, sizeof *bad, stream));
  float* absmax = static_cast<float*>(out.absmax.data);
  const int64_t blocks = p.Blocks(flat.count);
  if (p.nested_block_size > 0) {
    QM_TRY(qm::Scratch(call, call->device, blocks, "factors", &absmax));
  }
  QM_TRY(qm::Progress(call, 0.0));
  constexpr int64_t kMostBlocks = 1 << 16;
  const unsigned grid =
      static_cast<unsigned>(std::min<int64_t>((blocks + kWarps - 1) / kWarps, kMostBlocks));
  uint8_t* codes = static_cast<uint8_t*>(out.codes.data);
  const auto kernel = p.fp4 ? nf4_kernel1<true> : nf4_kernel1<false>;
  kernel<<<grid, kThreads, 0, stream>>>(flat, p.block_size, absmax, codes, bad);
  QM_CUDA(call, cudaGetLastError());
  if (p.nested_block_size > 0) QM_TRY(EncodeFactors(call, absmax, blocks, out));
  unsigned long long first = kNoBadWeight;
  QM_CUDA(call, cudaMemcpyAsync(&first, bad, sizeof first, cudaMemcpyDeviceToHost, stream));
  QM_CUDA(call, cudaStreamSynchronize(stream));
  if (first == kNoBadWeight) return QM_OK;
  const int64_t index = static_cast<int64_t>(first);
  return qm::NotFinite(call, index / flat.columns, index % flat.columns);
}

}  // namespace quantmill::nf4
