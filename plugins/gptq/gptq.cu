// Array operations of GPTQ on the GPU; the arithmetic of gptq_ref.cc (compiled with --fmad=false),
// so that equal inputs give equal codes.
//
// solve_block_kernel1 takes 32 rows of W through one block of columns:
//
//     tile[column][row]          a warp = 32 rows of one column: no bank conflicts
//     thread (r, part)           r = threadIdx % 32 owns a row, part = threadIdx / 32 of 8
//     for each column i          every part computes q and err of its row (the same value);
//                                part k updates the columns j > i with j % 8 == k; barrier
//
// Only the barrier orders the parts: column i + 1 is written by one part and read by all. u and p
// come through the read-only cache, one address per warp.
// Assumed: blocks of at most kMaxBlockSize columns; rows of weights and statistics contiguous.
#include <algorithm>
#include <cstdint>

#include "gptq.h"
#include "quantmill/sdk/affine_search.cuh"
#include "quantmill/sdk/cuda.hpp"

namespace quantmill::gptq {
namespace {

constexpr int kThreads = 256;
constexpr int kTileRows = 32;
constexpr int kParts = kThreads / kTileRows;
constexpr int kTilePitch = kTileRows + 1;  // column-wise loads of a row hit 32 banks
constexpr unsigned long long kNone = ~0ull;

// m: [rows, cols] with row_stride; first: least index r * cols + c of an element that is not
// finite.
__global__ void __launch_bounds__(kThreads)
    find_not_finite_kernel1(const float* __restrict__ m, int64_t rows, int64_t cols,
                            int64_t row_stride, unsigned long long* first) {
  const int64_t row = blockIdx.x;
  for (int64_t c = threadIdx.x; c < cols; c += kThreads) {
    if (!isfinite(m[row * row_stride + c])) {
      atomicMin(first, static_cast<unsigned long long>(row * cols + c));
    }
  }
}

// out[i] = m[i, i]
__global__ void __launch_bounds__(kThreads)
    read_diagonal_kernel1(const float* __restrict__ m, int64_t n, int64_t row_stride,
                          float* __restrict__ out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) out[i] = m[i * row_stride + i];
}

__global__ void __launch_bounds__(kThreads)
    set_diagonal_kernel1(float* __restrict__ m, int64_t n, const float* __restrict__ diagonal) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) m[i * n + i] = diagonal[i];
}

// One block per row: m[i, j] = j > i ? factor * m[i, j] : 0
__global__ void __launch_bounds__(kThreads)
    keep_above_diagonal_kernel1(float* __restrict__ m, int64_t n, float factor) {
  const int64_t i = blockIdx.x;
  for (int64_t j = threadIdx.x; j < n; j += kThreads) {
    float* x = m + i * n + j;
    *x = j > i ? *x * factor : 0.0f;
  }
}

// One block per row of out [rows, cols]: out[i, j] = in[row(i), channel[j]], row(i) = channel[i] if
// `square`, else i; 0 where `dead` says so.
__global__ void __launch_bounds__(kThreads)
    gather_kernel1(const float* __restrict__ in, int64_t row_stride, int64_t cols, bool square,
                   ColumnOrder order, float* __restrict__ out) {
  const int64_t i = blockIdx.x;
  const int64_t from = square && order.channel != nullptr ? order.channel[i] : i;
  const float* row = in + from * row_stride;
  for (int64_t j = threadIdx.x; j < cols; j += kThreads) {
    const int64_t c = order.channel != nullptr ? order.channel[j] : j;
    const bool dead = order.dead != nullptr && order.dead[c] != 0;
    out[i * cols + j] = dead ? 0.0f : row[c];
  }
}

// One warp per (row, group). Instances: groups of up to 128 and 256 in registers; longer ones read
// again on every pass.
template <int kCached>
__global__ void __launch_bounds__(kThreads)
    find_groups_kernel1(GroupTask task, Options options, void* __restrict__ scale,
                        uint8_t* __restrict__ zero) {
  const qm::AffineShape& shape = options.shape;
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (item >= task.rows * task.count) return;
  const int64_t row = item / task.count, g = item % task.count;
  const int64_t width = shape.group_width();
  const int64_t column = task.first_column + g * width;
  const qm::WarpGroup<kCached> values(
      task.source + row * task.row_stride + column, width,
      task.importance != nullptr ? task.importance + column : nullptr);
  const qm::AffineGroup group = qm::WarpFindAffineGroup(values, shape.rule, options.search);
  if (threadIdx.x % 32 != 0) return;
  const int64_t at = row * shape.groups() + task.first_group + g;
  qm::StoreScale(scale, shape.rule.scale_dtype, at, group.scale);
  if (zero != nullptr) zero[at] = static_cast<uint8_t>(group.zero);
}

template <bool kWalk, bool kCorrect>
__global__ void __launch_bounds__(kThreads)
    solve_block_kernel1(BlockTask task, qm::AffineRule rule, int64_t group_count,
                        const void* __restrict__ scales, const uint8_t* __restrict__ zeros) {
  extern __shared__ float tile[];  // [width][kTilePitch], then codes u8 [width][kTileRows]
  const int width = static_cast<int>(task.end - task.begin);
  uint8_t* tile_codes = reinterpret_cast<uint8_t*>(tile + width * kTilePitch);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTileRows;
  const int rows = static_cast<int>(min(static_cast<int64_t>(kTileRows), task.rows - first_row));
  const float* __restrict__ work = task.work + first_row * task.cols + task.begin;
  for (int k = threadIdx.x; k < width * rows; k += kThreads) {
    tile[(k % width) * kTilePitch + k / width] = work[(k / width) * task.cols + k % width];
  }
  __syncthreads();

  const int r = threadIdx.x % kTileRows, part = threadIdx.x / kTileRows;
  const bool owns_row = r < rows;  // others only keep the barriers company
  const float max_code = rule.max_code();
  qm::AffineGroup group = {1.0f, 0.5f * (max_code + 1.0f)};
  int32_t group_index = -1;
  for (int i = 0; i < width; ++i) {
    const int64_t column = task.begin + i;
    if (owns_row) {
      if (task.group_of[column] != group_index) {
        group_index = task.group_of[column];
        const int64_t at = (first_row + r) * group_count + group_index;
        group.scale = qm::LoadScale(scales, rule.scale_dtype, at);
        if (zeros != nullptr) group.zero = static_cast<float>(zeros[at]);
      }
      const float w = tile[i * kTilePitch + r];
      const float code = qm::EncodeAffine(w, group, max_code);
      if constexpr (kWalk) {
        const float* __restrict__ u = task.u + column * task.cols + task.begin;
        const float q = qm::DecodeAffine(code, group);
        const float err = (w - q) / __ldg(u + i);
        // The first column behind i of this part.
        int j = i + 1 + (part - (i + 1) % kParts + kParts) % kParts;
        if constexpr (kCorrect) {
          const float* __restrict__ p = task.p + column * task.cols + task.begin;
#pragma unroll 4
          for (; j < width; j += kParts) {
            tile[j * kTilePitch + r] -= err * __ldg(u + j) - w * __ldg(p + j);
          }
        } else {
#pragma unroll 4
          for (; j < width; j += kParts) tile[j * kTilePitch + r] -= err * __ldg(u + j);
        }
        if (part == 0) {
          task.err_t[i * task.rows + first_row + r] = err;
          if constexpr (kCorrect) task.q_t[i * task.rows + first_row + r] = q;
        }
      }
      if (part == 0) tile_codes[i * kTileRows + r] = static_cast<uint8_t>(code);
    }
    __syncthreads();
  }
  for (int k = threadIdx.x; k < width * rows; k += kThreads) {
    task.codes[(first_row + k / width) * task.cols + task.begin + k % width] =
        tile_codes[(k % width) * kTileRows + k / width];
  }
}

// codes: u8 [rows, cols] in solving order -> packed [rows, words] in channel order.
__global__ void __launch_bounds__(kThreads)
    pack_kernel1(const uint8_t* __restrict__ codes, int64_t rows, int64_t cols, int32_t bits,
                 int64_t words, const int32_t* __restrict__ position,
                 int32_t* __restrict__ packed) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= rows * words) return;
  packed[index] = static_cast<int32_t>(
      qm::PackWord(codes + index / words * cols, cols, bits, index % words, position));
}

unsigned Blocks(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

class CudaKernels final : public Kernels {
 public:
  explicit CudaKernels(qm_call* call) : call_(call), stream_(qm::Stream(call)) {}

  qm_status Upload(const void* host, int64_t bytes, void* device) override {
    // From pageable memory: `host` has been read when this returns.
    QM_CUDA(call_, cudaMemcpyAsync(device, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                                   stream_));
    return QM_OK;
  }

  qm_status ReadDiagonal(qm::TensorView<const float> m, float* host, bool* finite) override {
    const int64_t n = m.shape(0);
    float* diagonal = nullptr;
    QM_TRY(qm::Scratch(call_, call_->device, n, "a diagonal", &diagonal));
    read_diagonal_kernel1<<<Blocks(n), kThreads, 0, stream_>>>(m.data(), n, m.stride(0), diagonal);
    QM_CUDA(call_, cudaGetLastError());
    QM_CUDA(call_, cudaMemcpyAsync(host, diagonal, static_cast<size_t>(n) * sizeof(float),
                                   cudaMemcpyDeviceToHost, stream_));
    int64_t first = -1;
    QM_TRY(FindNotFinite(m, &first));
    *finite = first < 0;
    return QM_OK;
  }

  qm_status PermuteSquare(qm::TensorView<const float> m, const ColumnOrder& order,
                          float* out) override {
    const ColumnOrder permutation = {order.channel, order.position, nullptr};
    const int64_t n = m.shape(0);
    gather_kernel1<<<static_cast<unsigned>(n), kThreads, 0, stream_>>>(m.data(), m.stride(0), n,
                                                                       true, permutation, out);
    QM_CUDA(call_, cudaGetLastError());
    return QM_OK;
  }

  qm_status SetDiagonal(float* m, int64_t n, const float* diagonal) override {
    set_diagonal_kernel1<<<Blocks(n), kThreads, 0, stream_>>>(m, n, diagonal);
    QM_CUDA(call_, cudaGetLastError());
    return QM_OK;
  }

  qm_status KeepAboveDiagonal(float* m, int64_t n, float factor) override {
    keep_above_diagonal_kernel1<<<static_cast<unsigned>(n), kThreads, 0, stream_>>>(m, n, factor);
    QM_CUDA(call_, cudaGetLastError());
    return QM_OK;
  }

  qm_status FindNotFinite(qm::TensorView<const float> weight, int64_t* index) override {
    unsigned long long* device = nullptr;
    QM_TRY(qm::Scratch(call_, call_->device, 1, "the finiteness check", &device));
    QM_CUDA(call_, cudaMemsetAsync(device, 0xFF, sizeof *device, stream_));
    find_not_finite_kernel1<<<static_cast<unsigned>(weight.shape(0)), kThreads, 0, stream_>>>(
        weight.data(), weight.shape(0), weight.shape(1), weight.stride(0), device);
    QM_CUDA(call_, cudaGetLastError());
    unsigned long long first = kNone;
    QM_CUDA(call_, cudaMemcpyAsync(&first, device, sizeof first, cudaMemcpyDeviceToHost, stream_));
    QM_CUDA(call_, cudaStreamSynchronize(stream_));
    *index = first == kNone ? -1 : static_cast<int64_t>(first);
    return QM_OK;
  }

  qm_status GatherColumns(qm::TensorView<const float> weight, const ColumnOrder& order,
                          float* out) override {
    gather_kernel1<<<static_cast<unsigned>(weight.shape(0)), kThreads, 0, stream_>>>(
        weight.data(), weight.stride(0), weight.shape(1), false, order, out);
    QM_CUDA(call_, cudaGetLastError());
    return QM_OK;
  }

  qm_status FindGroups(const GroupTask& task, const Options& options,
                       const qm::AffineTensors& out) override {
    const int64_t width = options.shape.group_width();
    const auto kernel = width <= 128   ? find_groups_kernel1<4>
                        : width <= 256 ? find_groups_kernel1<8>
                                       : find_groups_kernel1<0>;
    kernel<<<Blocks(task.rows * task.count * 32), kThreads, 0, stream_>>>(
        task, options, out.scale.data, static_cast<uint8_t*>(out.zero.data));
    QM_CUDA(call_, cudaGetLastError());
    return QM_OK;
  }

  qm_status SolveBlock(const BlockTask& task, const Options& options,
                       const qm::AffineTensors& groups) override {
    const auto kernel = task.u == nullptr   ? solve_block_kernel1<false, false>
                        : task.p == nullptr ? solve_block_kernel1<true, false>
                                            : solve_block_kernel1<true, true>;
    const unsigned blocks = static_cast<unsigned>((task.rows + kTileRows - 1) / kTileRows);
    const size_t shared =
        static_cast<size_t>(task.end - task.begin) * (kTilePitch * sizeof(float) + kTileRows);
    kernel<<<blocks, kThreads, shared, stream_>>>(task, options.shape.rule, options.shape.groups(),
                                                  groups.scale.data,
                                                  static_cast<const uint8_t*>(groups.zero.data));
    QM_CUDA(call_, cudaGetLastError());
    return QM_OK;
  }

  qm_status Pack(const uint8_t* codes, const qm::AffineShape& shape, const ColumnOrder& order,
                 const qm::AffineTensors& out) override {
    const int64_t words = qm::AffineWordsPerRow(shape.in_features, shape.rule.bits);
    pack_kernel1<<<Blocks(shape.out_features * words), kThreads, 0, stream_>>>(
        codes, shape.out_features, shape.in_features, shape.rule.bits, words, order.position,
        static_cast<int32_t*>(out.codes.data));
    QM_CUDA(call_, cudaGetLastError());
    return QM_OK;
  }

 private:
  qm_call* call_;
  cudaStream_t stream_;
};

static_assert(kMaxBlockSize * (kTilePitch * sizeof(float) + kTileRows) <= 48 * 1024,
              "a tile must fit the shared memory every GPU grants without asking");

}  // namespace

std::unique_ptr<Kernels> MakeCudaKernels(qm_call* call) {
  return std::make_unique<CudaKernels>(call);
}

}  // namespace quantmill::gptq
