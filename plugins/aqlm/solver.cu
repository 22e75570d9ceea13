// The array operations of the solver on the GPU. Shapes are those of solver.h; CPU reference:
// solver_cpu.cc. Sums over many elements are exact or of fixed order, so that the same input gives
// the same bytes; how the work is split stands at the kernels: solver_arrays.cuh,
// solver_scatter.cuh, solver_search.cuh.
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>

#include "quantmill/sdk/cuda.hpp"
#include "solver.h"
#include "solver_arrays.cuh"
#include "solver_scatter.cuh"
#include "solver_search.cuh"

namespace quantmill::aqlm {
namespace {

constexpr int64_t kNearestSharedBytes = 40 * 1024;
constexpr int64_t kScatterSharedBytes = 96 * 1024;
constexpr int kScatterBlocks = 528;  // a few per multiprocessor of the largest devices

int CountBits(int64_t count) {
  int bits = 0;
  while ((int64_t{1} << bits) < count) ++bits;
  return bits;
}

class CudaKernels : public Kernels {
 public:
  CudaKernels(qm_call* call, const Options& options)
      : call_(call), o_(options), stream_(qm::Stream(call)) {}

  qm_status Upload(const void* host, int64_t bytes, void* device) override {
    // The source may go away at once, so the copy is waited for.
    QM_CUDA(call_, cudaMemcpyAsync(device, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                                   stream_));
    QM_CUDA(call_, cudaStreamSynchronize(stream_));
    return QM_OK;
  }
  qm_status Download(const void* device, int64_t bytes, void* host) override {
    QM_CUDA(call_, cudaMemcpyAsync(host, device, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost,
                                   stream_));
    QM_CUDA(call_, cudaStreamSynchronize(stream_));
    return QM_OK;
  }
  qm_status Copy(const void* from, int64_t bytes, void* to) override {
    QM_CUDA(call_, cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice,
                                   stream_));
    return QM_OK;
  }
  qm_status Clear(void* device, int64_t bytes) override {
    QM_CUDA(call_, cudaMemsetAsync(device, 0, static_cast<size_t>(bytes), stream_));
    return QM_OK;
  }

  qm_status FindNotFinite(Rows x, int64_t rows, int64_t cols, int64_t* index) override {
    QM_TRY(Reserve());
    constexpr unsigned long long kNone = ~0ull;
    unsigned long long first = kNone;
    QM_TRY(Upload(&first, 8, numbers_));
    FindNotFiniteKernel<<<Blocks(rows * cols), kThreads, 0, stream_>>>(
        x, rows, cols, static_cast<unsigned long long*>(numbers_));
    QM_CUDA(call_, cudaGetLastError());
    QM_TRY(Download(numbers_, 8, &first));
    *index = first == kNone ? -1 : static_cast<int64_t>(first);
    return QM_OK;
  }

  qm_status MakeGram(Rows hessian, int64_t n, float damp, float* gram) override {
    MakeGramKernel<<<Blocks(n * n), kThreads, 0, stream_>>>(hessian, n, damp, gram);
    QM_CUDA(call_, cudaGetLastError());
    return QM_OK;
  }

  qm_status Diagonal(Rows matrix, int64_t n, std::vector<float>* out) override {
    QM_TRY(Reserve());
    out->resize(static_cast<size_t>(n));
    DiagonalKernel<<<Blocks(n), kThreads, 0, stream_>>>(matrix, n, static_cast<float*>(numbers_));
    QM_CUDA(call_, cudaGetLastError());
    return Download(numbers_, n * 4, out->data());
  }

  qm_status RowDots(Rows a, Rows b, int64_t rows, std::vector<double>* out) override {
    QM_TRY(Reserve());
    out->resize(static_cast<size_t>(rows));
    RowDotsKernel<<<static_cast<unsigned>(rows), kThreads, 0, stream_>>>(
        a, b, o_.in, static_cast<double*>(numbers_));
    QM_CUDA(call_, cudaGetLastError());
    return Download(numbers_, rows * 8, out->data());
  }

  qm_status Normalize(Rows x, int64_t row_step, int64_t rows, float* out) override {
    NormalizeKernel<<<Blocks(rows * o_.in), kThreads, 0, stream_>>>(x, row_step, rows, o_.in,
                                                                    arrays.scales, out);
    QM_CUDA(call_, cudaGetLastError());
    return QM_OK;
  }

  qm_status Pick(const float* x, const std::vector<int64_t>& at, std::vector<float>* out) override {
    const int64_t count = static_cast<int64_t>(at.size()), d = o_.params.group_size;
    QM_TRY(Reserve());
    out->resize(static_cast<size_t>(count * d));
    QM_TRY(Upload(at.data(), count * 8, positions_));
    PickKernel<<<Blocks(count * d), kThreads, 0, stream_>>>(x, positions_, count,
                                                            static_cast<int>(d), columns_);
    QM_CUDA(call_, cudaGetLastError());
    return Download(columns_, count * d * 4, out->data());
  }

  qm_status Nearest(const float* x, int64_t rows, int32_t m) override {
    const Params& p = o_.params;
    const int d = p.group_size;
    const int chunk = static_cast<int>(
        std::min<int64_t>(p.length(), kNearestSharedBytes / (4 * (int64_t{d} + 1))));
    const int64_t points = rows * o_.groups();
    const float* codebook = arrays.codebooks + static_cast<int64_t>(m) * p.length() * d;
    const size_t bytes = static_cast<size_t>(chunk) * static_cast<size_t>(d + 1) * 4;
    const auto launch = [&](auto kernel) {
      kernel<<<Blocks(points), kThreads, bytes, stream_>>>(x, points, d, codebook, p.length(),
                                                           chunk, p.codebooks, m, arrays.indices);
    };
    if (d == 8) {
      launch(NearestKernel<8>);
    } else if (d == 16) {
      launch(NearestKernel<16>);
    } else {
      launch(NearestKernel<0>);
    }
    QM_CUDA(call_, cudaGetLastError());
    return QM_OK;
  }

  qm_status Subtract(int64_t rows, int32_t m, float* x) override {
    SubtractKernel<<<Blocks(rows * o_.in), kThreads, 0, stream_>>>(
        rows * o_.in, o_.params, m, arrays.codebooks, arrays.indices, x);
    QM_CUDA(call_, cudaGetLastError());
    return QM_OK;
  }

  qm_status Decode(const float* codebooks, const float* factors, Rows base, int64_t rows,
                   float* out) override {
    DecodeKernel<<<Blocks(rows * o_.in), kThreads, 0, stream_>>>(
        rows * o_.in, o_.in, o_.params, codebooks, arrays.indices, factors, base, out);
    QM_CUDA(call_, cudaGetLastError());
    return QM_OK;
  }

  qm_status Scatter(Rows x, int64_t rows, const float* factors, int32_t power, int32_t first,
                    int32_t last, std::vector<double>* sums) override {
    const Params& p = o_.params;
    QM_TRY(Reserve());
    const int64_t values = static_cast<int64_t>(last - first) * p.length() * p.group_size;
    const int64_t elements = rows * o_.in;
    unsigned* largest = static_cast<unsigned*>(numbers_);
    QM_CUDA(call_, cudaMemsetAsync(largest, 0, sizeof(unsigned), stream_));
    QM_CUDA(call_, cudaMemsetAsync(sums_, 0, static_cast<size_t>(values) * 8, stream_));
    const unsigned blocks = std::min<unsigned>(kScatterBlocks, Blocks(elements));
    LargestKernel<<<blocks, kThreads, 0, stream_>>>(x, elements, o_.in, factors, power, largest);
    QM_CUDA(call_, cudaGetLastError());
    const int count_bits = CountBits(rows * o_.groups());
    const ScatterTask task = {x,    elements, o_.in,          factors, power,      first,
                              last, p,        arrays.indices, largest, count_bits, sums_};
    if (values * 8 <= kScatterSharedBytes) {
      QM_CUDA(call_,
              cudaFuncSetAttribute(ScatterKernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(kScatterSharedBytes)));
      ScatterKernel<true><<<blocks, kThreads, static_cast<size_t>(values) * 8, stream_>>>(task);
    } else {
      ScatterKernel<false><<<blocks, kThreads, 0, stream_>>>(task);
    }
    QM_CUDA(call_, cudaGetLastError());
    std::vector<int64_t> integers(static_cast<size_t>(values));
    uint32_t bits = 0;
    QM_TRY(Download(largest, 4, &bits));
    QM_TRY(Download(sums_, values * 8, integers.data()));
    const float most = qm::FloatFromBits(bits);
    sums->assign(static_cast<size_t>(values), std::isfinite(most) ? 0.0 : NAN);
    if (!(most > 0.0f) || !std::isfinite(most)) return QM_OK;
    const int shift = ScatterShift(most, count_bits);
    for (int64_t v = 0; v < values; ++v) {
      (*sums)[v] = std::ldexp(static_cast<double>(integers[v]), -shift);
    }
    return QM_OK;
  }

  qm_status SearchPanel(const PanelTask& task) override {
    const Params& p = o_.params;
    QM_TRY(Reserve());
    PanelView v;
    v.params = p;
    v.rows = o_.out;
    v.cols = o_.in;
    v.first_column = task.first_group * p.group_size;
    v.groups = static_cast<int>(task.groups);
    v.width = v.groups * p.group_size;
    v.beam = o_.beam;
    v.codebooks = arrays.codebooks;
    v.columns = columns_;
    v.tables = tables_;
    v.scales = arrays.scales;
    v.indices = arrays.indices;
    v.task = task;
    if (task.first_group == 0) {
      TransposeKernel<<<Blocks(p.values()), kThreads, 0, stream_>>>(p, arrays.codebooks, columns_);
      QM_CUDA(call_, cudaGetLastError());
    }
    const int64_t entries = static_cast<int64_t>(v.groups) * p.codebooks * p.length();
    TableKernel<<<Blocks(entries), kThreads, 0, stream_>>>(v, tables_);
    QM_CUDA(call_, cudaGetLastError());
    return o_.beam == 1 ? Search(v) : BeamSearch(v);
  }

  qm_status StoreCodes(void* codes) override {
    const int64_t count = o_.out * o_.groups() * o_.params.codebooks;
    StoreCodesKernel<<<Blocks(count), kThreads, 0, stream_>>>(arrays.indices, count,
                                                              o_.params.index_bits, codes);
    QM_CUDA(call_, cudaGetLastError());
    return QM_OK;
  }

  qm_status LoadCodes(const void* codes) override {
    const int64_t count = o_.out * o_.groups() * o_.params.codebooks;
    LoadCodesKernel<<<Blocks(count), kThreads, 0, stream_>>>(codes, count, o_.params.index_bits,
                                                             arrays.indices);
    QM_CUDA(call_, cudaGetLastError());
    return QM_OK;
  }

  qm_status Difference(const void* a, const void* b, qm_dtype dtype, int64_t count, float factor,
                       float* out, double* sum) override {
    QM_TRY(Reserve());
    DifferenceKernel<<<kDifferenceBlocks, kThreads, 0, stream_>>>(a, b, dtype, count, factor, out,
                                                                  static_cast<double*>(numbers_));
    QM_CUDA(call_, cudaGetLastError());
    std::vector<double> partial(kDifferenceBlocks);
    QM_TRY(Download(numbers_, kDifferenceBlocks * 8, partial.data()));
    *sum = 0;
    for (const double own : partial) *sum += own;
    return QM_OK;
  }

 private:
  qm_status Search(const PanelView& v) {
    constexpr int kRows = kSearchWarps * kRowsPerWarp;
    const unsigned blocks = static_cast<unsigned>((v.rows + kRows - 1) / kRows);
    const size_t bytes = static_cast<size_t>(kRows * (v.width + v.params.group_size)) * 4;
    const auto launch = [&](auto kernel) {
      kernel<<<blocks, kSearchWarps * 32, bytes, stream_>>>(v);
    };
    if (v.params.group_size == 8) {
      launch(SearchKernel<8>);
    } else if (v.params.group_size == 16) {
      launch(SearchKernel<16>);
    } else {
      launch(SearchKernel<0>);
    }
    QM_CUDA(call_, cudaGetLastError());
    return QM_OK;
  }

  qm_status BeamSearch(const PanelView& v) {
    const int64_t bytes = BeamSharedBytes(v.params, v.beam, v.width, v.groups);
    QM_CUDA(call_,
            cudaFuncSetAttribute(BeamSearchKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes)));
    BeamSearchKernel<<<static_cast<unsigned>(v.rows), kBeamThreads, static_cast<size_t>(bytes),
                       stream_>>>(v);
    QM_CUDA(call_, cudaGetLastError());
    return QM_OK;
  }

  // Memory of the kernels, at the first need.
  qm_status Reserve() {
    if (numbers_ != nullptr) return QM_OK;
    const Params& p = o_.params;
    const int64_t most = std::max<int64_t>({o_.out, o_.in, kDifferenceBlocks});
    double* numbers = nullptr;
    QM_TRY(qm::Scratch(call_, call_->device, most, "row sums", &numbers));
    numbers_ = numbers;
    QM_TRY(qm::Scratch(call_, call_->device, p.length(), "positions", &positions_));
    QM_TRY(qm::Scratch(call_, call_->device, p.values(), "codebooks", &columns_));
    QM_TRY(qm::Scratch(call_, call_->device, p.values(), "sums", &sums_));
    return qm::Scratch(call_, call_->device, o_.panel_groups() * p.codebooks * p.length(), "tables",
                       &tables_);
  }

  qm_call* call_;
  const Options& o_;
  cudaStream_t stream_;
  void* numbers_ = nullptr;  // max(out, in, kDifferenceBlocks) doubles
  int64_t* positions_ = nullptr;
  float *columns_ = nullptr, *tables_ = nullptr;
  unsigned long long* sums_ = nullptr;
};

}  // namespace

std::unique_ptr<Kernels> MakeCudaKernels(qm_call* call, const Options& options) {
  return std::make_unique<CudaKernels>(call, options);
}

uint64_t CudaKernelBytes(const Options& o) {
  const Params& p = o.params;
  return static_cast<uint64_t>(8 * std::max<int64_t>({o.out, o.in, kDifferenceBlocks}) +
                               8 * p.length() + 12 * p.values() +
                               4 * o.panel_groups() * p.codebooks * p.length()) +
         5 * 256;
}

}  // namespace quantmill::aqlm
