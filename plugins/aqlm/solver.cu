// The array operations of the solver on the GPU. Shapes are those of solver.h; CPU reference:
// solver_cpu.cc. Sums over many elements are exact or of fixed order, so that the same input gives
// the same bytes:
//   RowDots    a block per row, f64, joined pairwise
//   Scatter    fixed point: |factor x| < 2^e over all elements, terms are rounded to multiples of
//              2^(e - s), s such that the sum of all fits 62 bits; integers may be added in any
//              order (shared memory where the sums fit, then global)
//   Nearest    a thread per group; the codebook passes through shared memory in chunks
//   SearchPanel, beam 1: a warp per four rows; lanes share out the vectors of a codebook, P of the
//              rows stays in shared memory for all groups of the panel
//   SearchPanel, larger beam: a block per row; all hypotheses in shared memory, double buffered
// Codes can differ from the CPU's where two candidates are closer than rounding.
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>

#include "quantmill/sdk/cuda.hpp"
#include "solver.h"

namespace quantmill::aqlm {
namespace {

constexpr int kThreads = 256;

unsigned Blocks(int64_t items) {
  return static_cast<unsigned>(std::max<int64_t>(1, (items + kThreads - 1) / kThreads));
}
__device__ inline int64_t ThreadIndex() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__global__ void FindNotFiniteKernel(Rows x, int64_t rows, int64_t cols, unsigned long long* first) {
  const int64_t i = ThreadIndex();
  if (i < rows * cols && !isfinite(x.data[i / cols * x.stride + i % cols])) {
    atomicMin(first, static_cast<unsigned long long>(i));
  }
}

__global__ void MakeGramKernel(Rows hessian, int64_t n, float damp, float* gram) {
  const int64_t i = ThreadIndex();
  if (i >= n * n) return;
  const int64_t r = i / n, c = i % n;
  const float value =
      hessian.data != nullptr ? hessian.data[r * hessian.stride + c] : (r == c ? 1.0f : 0.0f);
  gram[i] = r == c ? value + damp : value;
}

__global__ void DiagonalKernel(Rows matrix, int64_t n, float* out) {
  const int64_t i = ThreadIndex();
  if (i < n) out[i] = matrix.data[i * matrix.stride + i];
}

__global__ void __launch_bounds__(kThreads)
    RowDotsKernel(Rows a, Rows b, int64_t cols, double* out) {
  const int64_t r = blockIdx.x;
  double sum = 0;
  for (int64_t c = threadIdx.x; c < cols; c += kThreads) {
    sum += static_cast<double>(a.data[r * a.stride + c]) *
           static_cast<double>(b.data[r * b.stride + c]);
  }
  __shared__ double shared[kThreads];
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) out[r] = shared[0];
}

__global__ void NormalizeKernel(Rows x, int64_t row_step, int64_t rows, int64_t cols,
                                const float* scales, float* out) {
  const int64_t i = ThreadIndex();
  if (i >= rows * cols) return;
  const int64_t r = i / cols * row_step;
  out[i] = scales[r] > 0.0f ? x.data[r * x.stride + i % cols] / scales[r] : 0.0f;
}

__global__ void PickKernel(const float* x, const int64_t* at, int64_t count, int d, float* out) {
  const int64_t i = ThreadIndex();
  if (i < count * d) out[i] = x[at[i / d] * d + i % d];
}

// A codebook passes through shared memory in chunks of `chunk` vectors, with half their squared
// norms behind them. kD: group_size, or 0 for any.
template <int kD>
__global__ void __launch_bounds__(kThreads)
    NearestKernel(const float* x, int64_t points, int any_d, const float* codebook, int length,
                  int chunk, int codebooks, int m, uint16_t* indices) {
  extern __shared__ float shared[];
  const int d = kD > 0 ? kD : any_d;
  float* norms = shared + static_cast<int64_t>(chunk) * d;
  const int64_t point = ThreadIndex();
  const bool inside = point < points;
  const float* own = x + (inside ? point : 0) * d;
  float held[kD > 0 ? kD : 1];
  if constexpr (kD > 0) {
#pragma unroll
    for (int a = 0; a < kD; ++a) held[a] = own[a];
  }
  float best = INFINITY;
  int index = 0;
  for (int begin = 0; begin < length; begin += chunk) {
    const int count = min(chunk, length - begin);
    __syncthreads();
    for (int i = threadIdx.x; i < count * d; i += kThreads) {
      shared[i] = codebook[static_cast<int64_t>(begin) * d + i];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < count; c += kThreads) {
      float norm = 0.0f;
      for (int a = 0; a < d; ++a) norm += shared[c * d + a] * shared[c * d + a];
      norms[c] = norm;
    }
    __syncthreads();
    for (int c = 0; c < count; ++c) {
      float inner = 0.0f;
      if constexpr (kD > 0) {
#pragma unroll
        for (int a = 0; a < kD; ++a) inner += held[a] * shared[c * kD + a];
      } else {
        for (int a = 0; a < d; ++a) inner += own[a] * shared[c * d + a];
      }
      const float score = norms[c] - 2.0f * inner;
      if (score < best) {
        best = score;
        index = begin + c;
      }
    }
  }
  if (inside) indices[point * codebooks + m] = static_cast<uint16_t>(index);
}

// One thread per element of x [rows, in].
__global__ void SubtractKernel(int64_t elements, Params p, int m, const float* codebooks,
                               const uint16_t* indices, float* x) {
  const int64_t i = ThreadIndex();
  if (i >= elements) return;
  const int64_t group = i / p.group_size;
  const int64_t vector = static_cast<int64_t>(m) * p.length() + indices[group * p.codebooks + m];
  x[i] -= codebooks[vector * p.group_size + i % p.group_size];
}

__global__ void DecodeKernel(int64_t elements, int64_t cols, Params p, const float* codebooks,
                             const uint16_t* indices, const float* factors, Rows base, float* out) {
  const int64_t i = ThreadIndex();
  if (i >= elements) return;
  const int64_t group = i / p.group_size, r = i / cols;
  float sum = 0.0f;
  for (int m = 0; m < p.codebooks; ++m) {
    const int64_t vector = static_cast<int64_t>(m) * p.length() + indices[group * p.codebooks + m];
    sum += codebooks[vector * p.group_size + i % p.group_size];
  }
  sum *= factors[r];
  out[i] = base.data != nullptr ? base.data[r * base.stride + i % cols] - sum : sum;
}

// ---- scatter ------------------------------------------------------------------------------------
__device__ inline float Power(float factor, int power) {
  return power == 0 ? 1.0f : power == 1 ? factor : factor * factor;
}

// Bits of the largest |factor^power x|: order of magnitudes is that of their bits. NaN is largest.
__global__ void __launch_bounds__(kThreads)
    LargestKernel(Rows x, int64_t elements, int64_t cols, const float* factors, int power,
                  unsigned* largest) {
  unsigned own = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = ThreadIndex(); i < elements; i += step) {
    const int64_t r = i / cols;
    const float value = x.data[r * x.stride + i % cols] * Power(factors[r], power);
    own = max(own, __float_as_uint(fabsf(value)));
  }
  own = __reduce_max_sync(0xFFFFFFFFu, own);
  if (threadIdx.x % 32 == 0) atomicMax(largest, own);
}

struct ScatterTask {
  Rows x;
  int64_t elements, cols;
  const float* factors;
  int power, first, last;
  Params params;
  const uint16_t* indices;
  const unsigned* largest;   // device: see LargestKernel
  int count_bits;            // 2^count_bits is at least the number of terms
  unsigned long long* sums;  // [last - first, 2^B, d], zeroed; two's complement
};

// 2^shift turns a term into an integer; the sum of all terms stays below 2^62.
__host__ __device__ inline int ScatterShift(float largest, int count_bits) {
  int exponent = 0;
  frexpf(largest, &exponent);  // largest < 2^exponent
  return 62 - exponent - count_bits;
}

template <bool kShared>
__global__ void __launch_bounds__(kThreads) ScatterKernel(ScatterTask task) {
  extern __shared__ unsigned long long own[];
  const Params& p = task.params;
  const int d = p.group_size;
  const int64_t per_codebook = static_cast<int64_t>(p.length()) * d;
  const int64_t values = (task.last - task.first) * per_codebook;
  const float largest = __uint_as_float(*task.largest);
  if (!(largest > 0.0f) || !isfinite(largest)) return;  // uniform; sums stay 0
  const int shift = ScatterShift(largest, task.count_bits);
  if constexpr (kShared) {
    for (int64_t v = threadIdx.x; v < values; v += kThreads) own[v] = 0;
    __syncthreads();
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = ThreadIndex(); i < task.elements; i += step) {
    const int64_t r = i / task.cols, group = i / d;
    const float value =
        task.x.data[r * task.x.stride + i % task.cols] * Power(task.factors[r], task.power);
    const unsigned long long term =
        static_cast<unsigned long long>(__double2ll_rn(scalbn(static_cast<double>(value), shift)));
    for (int m = task.first; m < task.last; ++m) {
      const int64_t to = (m - task.first) * per_codebook +
                         static_cast<int64_t>(task.indices[group * p.codebooks + m]) * d + i % d;
      atomicAdd(kShared ? own + to : task.sums + to, term);
    }
  }
  if constexpr (kShared) {
    __syncthreads();
    for (int64_t v = threadIdx.x; v < values; v += kThreads) {
      if (own[v] != 0) atomicAdd(task.sums + v, own[v]);
    }
  }
}

// ---- search -------------------------------------------------------------------------------------
// columns [M, d, 2^B] = codebooks [M, 2^B, d] with vectors side by side.
__global__ void TransposeKernel(Params p, const float* codebooks, float* columns) {
  const int64_t i = ThreadIndex();
  if (i >= p.values()) return;
  const int64_t c = i % p.length(), a = i / p.length() % p.group_size;
  const int64_t m = i / (static_cast<int64_t>(p.length()) * p.group_size);
  columns[i] = codebooks[(m * p.length() + c) * p.group_size + a];
}

struct PanelView {
  Params params;
  int64_t rows, cols;    // of the weight
  int64_t first_column;  // of the panel
  int groups, width;     // of the panel
  int beam;
  const float* codebooks;  // [M, 2^B, d]
  const float* columns;    // [M, d, 2^B]
  const float* tables;     // [groups, M, 2^B]
  const float* scales;     // [rows]
  uint16_t* indices;
  PanelTask task;

  __device__ const float* Vector(int m, int index) const {
    return codebooks + (static_cast<int64_t>(m) * params.length() + index) * params.group_size;
  }
  // Row a of the Gram matrix at group j of the panel, from the first column of the panel on.
  __device__ const float* GramRow(int j, int a) const {
    return task.gram + (first_column + j * params.group_size + a) * cols + first_column;
  }
  __device__ int64_t row_codes() const { return cols / params.group_size * params.codebooks; }
};

// tables[j, m, c] = c G_jj c^T.
__global__ void TableKernel(PanelView v, float* tables) {
  const Params& p = v.params;
  const int64_t i = ThreadIndex();
  if (i >= static_cast<int64_t>(v.groups) * p.codebooks * p.length()) return;
  const int c = static_cast<int>(i % p.length()),
            m = static_cast<int>(i / p.length() % p.codebooks);
  const int j = static_cast<int>(i / (static_cast<int64_t>(p.length()) * p.codebooks));
  const float* vector = v.Vector(m, c);
  float sum = 0.0f;
  for (int a = 0; a < p.group_size; ++a) {
    const float* row = v.GramRow(j, a) + j * p.group_size;
    float inner = 0.0f;
    for (int b = 0; b < p.group_size; ++b) inner += row[b] * vector[b];
    sum += vector[a] * inner;
  }
  tables[i] = sum;
}

constexpr int kSearchWarps = 4;
constexpr int kRowsPerWarp = 4;

// Shared memory of a warp: P [4, width], g [4, d].
template <int kD>
__global__ void __launch_bounds__(kSearchWarps * 32) SearchKernel(PanelView v) {
  extern __shared__ float memory[];
  const Params& p = v.params;
  const int d = kD > 0 ? kD : p.group_size, length = p.length();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* product = memory + warp * kRowsPerWarp * (v.width + d);
  float* g = product + kRowsPerWarp * v.width;
  const int64_t first_row = (static_cast<int64_t>(blockIdx.x) * kSearchWarps + warp) * kRowsPerWarp;
  if (first_row >= v.rows) return;  // whole warps; no block-wide barrier follows
  float scale[kRowsPerWarp];
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    scale[r] = first_row + r < v.rows ? v.scales[first_row + r] : 0.0f;
    for (int b = lane; b < v.width; b += 32) {
      product[r * v.width + b] =
          first_row + r < v.rows ? v.task.product[(first_row + r) * v.width + b] : 0.0f;
    }
  }
  __syncwarp();
  for (int i = 0; i < v.groups * p.codebooks; ++i) {
    const int j = i / p.codebooks, m = i % p.codebooks;
    int old[kRowsPerWarp];
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      old[r] = first_row + r < v.rows ? v.indices[(first_row + r) * v.row_codes() +
                                                  (v.first_column / d + j) * p.codebooks + m]
                                      : 0;
      const float* vector = v.Vector(m, old[r]);
      for (int b = lane; b < d; b += 32) {
        float sum = product[r * v.width + j * d + b];
        for (int a = 0; a < d; ++a) sum += scale[r] * vector[a] * v.GramRow(j, a)[j * d + b];
        g[r * d + b] = 2.0f * sum;
      }
    }
    __syncwarp();
    float best[kRowsPerWarp];
    int index[kRowsPerWarp];
    float held[kRowsPerWarp][kD > 0 ? kD : 1];
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      best[r] = INFINITY;
      index[r] = 0;
      if constexpr (kD > 0) {
#pragma unroll
        for (int a = 0; a < kD; ++a) held[r][a] = g[r * kD + a];
      }
    }
    const float* table = v.tables + static_cast<int64_t>(i) * length;
    const float* columns = v.columns + static_cast<int64_t>(m) * d * length;
    for (int c = lane; c < length; c += 32) {
      const float form = table[c];
      float score[kRowsPerWarp];
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) score[r] = scale[r] * form;
      if constexpr (kD > 0) {
#pragma unroll
        for (int a = 0; a < kD; ++a) {
          const float value = __ldg(columns + a * length + c);
#pragma unroll
          for (int r = 0; r < kRowsPerWarp; ++r) score[r] -= held[r][a] * value;
        }
      } else {
        for (int a = 0; a < d; ++a) {
          const float value = __ldg(columns + static_cast<int64_t>(a) * length + c);
#pragma unroll
          for (int r = 0; r < kRowsPerWarp; ++r) score[r] -= g[r * d + a] * value;
        }
      }
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) {
        if (score[r] < best[r]) {
          best[r] = score[r];
          index[r] = c;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      for (int half = 16; half > 0; half /= 2) {
        const float other = __shfl_xor_sync(0xFFFFFFFFu, best[r], half);
        const int other_index = __shfl_xor_sync(0xFFFFFFFFu, index[r], half);
        if (other < best[r] || (other == best[r] && other_index < index[r])) {
          best[r] = other;
          index[r] = other_index;
        }
      }
      // The same in all lanes.
      if (!(scale[r] > 0.0f) || index[r] == old[r] || !(best[r] < INFINITY)) continue;
      const float *from = v.Vector(m, old[r]), *to = v.Vector(m, index[r]);
      for (int b = lane; b < v.width; b += 32) {
        float sum = 0.0f;
        for (int a = 0; a < d; ++a) sum += (to[a] - from[a]) * v.GramRow(j, a)[b];
        product[r * v.width + b] -= scale[r] * sum;
      }
      float* residual = v.task.residual + (first_row + r) * v.cols + v.first_column + j * d;
      for (int a = lane; a < d; a += 32) residual[a] -= scale[r] * (to[a] - from[a]);
      if (lane == 0) {
        v.indices[(first_row + r) * v.row_codes() + (v.first_column / d + j) * p.codebooks + m] =
            static_cast<uint16_t>(index[r]);
      }
    }
    __syncwarp();
  }
}

// ---- search with a beam -------------------------------------------------------------------------
constexpr int kBeamThreads = 128;

struct BeamChild {
  float loss;
  int parent, index;
};
// Smaller loss first, then the one a search in order finds first.
__device__ inline bool Before(const BeamChild& a, const BeamChild& b) {
  if (a.loss != b.loss) return a.loss < b.loss;
  if (a.parent != b.parent) return a.parent < b.parent;
  return a.index < b.index;
}

// Shared memory: P and residual [2, beam, width], g [beam, d], losses and scores of the old codes
// [2, beam], then ints: roots [2, beam], codes [2, beam, groups * M].
__host__ __device__ inline int64_t BeamSharedBytes(const Params& p, int beam, int width,
                                                   int groups) {
  return 4 * (int64_t{4} * beam * width + beam * p.group_size + 4 * beam) + 4 * int64_t{2} * beam +
         2 * int64_t{2} * beam * groups * p.codebooks +
         static_cast<int64_t>(sizeof(BeamChild)) * (kBeamThreads + beam) + 64;
}

__global__ void __launch_bounds__(kBeamThreads) BeamSearchKernel(PanelView v) {
  extern __shared__ float memory[];
  const Params& p = v.params;
  const int d = p.group_size, length = p.length(), beam = v.beam, width = v.width;
  const int codes = v.groups * p.codebooks;
  float* product = memory;                                            // [2, beam, width]
  float* residual = product + 2 * beam * width;                       // [2, beam, width]
  float* g = residual + 2 * beam * width;                             // [beam, d]
  float* losses = g + beam * d;                                       // [2, beam]
  float* old_scores = losses + 2 * beam;                              // [beam]; beam more unused
  int* roots = reinterpret_cast<int*>(old_scores + 2 * beam);         // [2, beam]
  BeamChild* heads = reinterpret_cast<BeamChild*>(roots + 2 * beam);  // [threads]
  BeamChild* chosen = heads + kBeamThreads;                           // [beam]
  uint16_t* own_codes = reinterpret_cast<uint16_t*>(chosen + beam);   // [2, beam, codes]
  const int64_t r = blockIdx.x;
  const int tid = threadIdx.x;
  const float scale = v.scales[r];
  int live = v.task.live[r];
  const int64_t code_offset = v.first_column / d * p.codebooks;
  for (int i = tid; i < live * width; i += kBeamThreads) {
    const int64_t at = static_cast<int64_t>(i / width) * v.rows + r;
    product[i] = v.task.product[at * width + i % width];
    residual[i] = v.task.residual[at * v.cols + v.first_column + i % width];
  }
  for (int i = tid; i < live * codes; i += kBeamThreads) {
    const int64_t at = static_cast<int64_t>(i / codes) * v.rows + r;
    own_codes[i] = v.indices[at * v.row_codes() + code_offset + i % codes];
  }
  for (int h = tid; h < live; h += kBeamThreads) {
    losses[h] = v.task.losses[static_cast<int64_t>(h) * v.rows + r];
    roots[h] = h;
  }
  __syncthreads();
  int now = 0;  // half of the double buffers in use
  for (int i = 0; scale > 0.0f && i < codes; ++i) {
    const int j = i / p.codebooks, m = i % p.codebooks;
    const float* table = v.tables + static_cast<int64_t>(i) * length;
    const float* columns = v.columns + static_cast<int64_t>(m) * d * length;
    for (int k = tid; k < live * d; k += kBeamThreads) {
      const int h = k / d, b = k % d;
      const float* vector = v.Vector(m, own_codes[(now * beam + h) * codes + i]);
      float sum = product[(now * beam + h) * width + j * d + b];
      for (int a = 0; a < d; ++a) sum += scale * vector[a] * v.GramRow(j, a)[j * d + b];
      g[k] = 2.0f * sum;
    }
    __syncthreads();
    for (int h = tid; h < live; h += kBeamThreads) {
      const int c = own_codes[(now * beam + h) * codes + i];
      float score = scale * table[c];
      for (int a = 0; a < d; ++a)
        score -= g[h * d + a] * columns[static_cast<int64_t>(a) * length + c];
      old_scores[h] = score;
    }
    __syncthreads();
    // The best of this thread's candidates, in order.
    BeamChild best[kMaxBeam];
    for (int k = 0; k < kMaxBeam; ++k) best[k] = {INFINITY, INT_MAX, INT_MAX};
    for (int h = 0; h < live; ++h) {
      const float base = losses[now * beam + h] - scale * old_scores[h];
      for (int c = tid; c < length; c += kBeamThreads) {
        float score = scale * table[c];
        for (int a = 0; a < d; ++a) {
          score -= g[h * d + a] * columns[static_cast<int64_t>(a) * length + c];
        }
        BeamChild child = {base + scale * score, h, c};
        if (!(child.loss < INFINITY) || !Before(child, best[beam - 1])) continue;
        int at = beam - 1;
        for (; at > 0 && Before(child, best[at - 1]); --at) best[at] = best[at - 1];
        best[at] = child;
      }
    }
    int head = 0, found = 0;
    for (int k = 0; k < beam; ++k) {
      heads[tid] = head < beam ? best[head] : BeamChild{INFINITY, INT_MAX, INT_MAX};
      __syncthreads();
      for (int half = kBeamThreads / 2; half > 0; half /= 2) {
        if (tid < half && Before(heads[tid + half], heads[tid])) heads[tid] = heads[tid + half];
        __syncthreads();
      }
      const BeamChild winner = heads[0];
      __syncthreads();                       // heads are written again
      if (!(winner.loss < INFINITY)) break;  // the same in all threads
      if (tid == 0) chosen[k] = winner;
      if (head < beam && best[head].parent == winner.parent && best[head].index == winner.index) {
        ++head;
      }
      ++found;
    }
    __syncthreads();
    if (found == 0) continue;
    const int then = 1 - now;
    for (int k = tid; k < found * width; k += kBeamThreads) {
      const int h = k / width, b = k % width;
      const BeamChild child = chosen[h];
      const float* from = v.Vector(m, own_codes[(now * beam + child.parent) * codes + i]);
      const float* to = v.Vector(m, child.index);
      float sum = 0.0f;
      for (int a = 0; a < d; ++a) sum += (to[a] - from[a]) * v.GramRow(j, a)[b];
      product[(then * beam + h) * width + b] =
          product[(now * beam + child.parent) * width + b] - scale * sum;
      float left = residual[(now * beam + child.parent) * width + b];
      if (b / d == j) left -= scale * (to[b % d] - from[b % d]);
      residual[(then * beam + h) * width + b] = left;
    }
    for (int k = tid; k < found * codes; k += kBeamThreads) {
      const int h = k / codes;
      own_codes[(then * beam + h) * codes + k % codes] =
          k % codes == i ? static_cast<uint16_t>(chosen[h].index)
                         : own_codes[(now * beam + chosen[h].parent) * codes + k % codes];
    }
    for (int h = tid; h < found; h += kBeamThreads) {
      losses[then * beam + h] = chosen[h].loss;
      roots[then * beam + h] = roots[now * beam + chosen[h].parent];
    }
    __syncthreads();
    now = then;
    live = found;
  }
  for (int h = 0; h < live; ++h) {
    const int64_t to = static_cast<int64_t>(h) * v.rows + r;
    const int64_t from = static_cast<int64_t>(roots[now * beam + h]) * v.rows + r;
    for (int64_t c = tid; c < v.cols; c += kBeamThreads) {
      const int64_t b = c - v.first_column;
      v.task.next_residual[to * v.cols + c] = b >= 0 && b < width
                                                  ? residual[(now * beam + h) * width + b]
                                                  : v.task.residual[from * v.cols + c];
    }
    for (int64_t c = tid; c < v.row_codes(); c += kBeamThreads) {
      const int64_t b = c - code_offset;
      v.task.next_indices[to * v.row_codes() + c] = b >= 0 && b < codes
                                                        ? own_codes[(now * beam + h) * codes + b]
                                                        : v.indices[from * v.row_codes() + c];
    }
    if (tid == 0) v.task.losses[to] = losses[now * beam + h];
  }
  if (tid == 0) v.task.live[r] = live;
}

__global__ void StoreCodesKernel(const uint16_t* indices, int64_t count, int index_bits,
                                 void* codes) {
  const int64_t i = ThreadIndex();
  if (i >= count) return;
  const int32_t code = CodeOfIndex(indices[i], index_bits);
  if (index_bits <= 8) {
    static_cast<int8_t*>(codes)[i] = static_cast<int8_t>(code);
  } else {
    static_cast<int16_t*>(codes)[i] = static_cast<int16_t>(code);
  }
}

__global__ void LoadCodesKernel(const void* codes, int64_t count, int index_bits,
                                uint16_t* indices) {
  const int64_t i = ThreadIndex();
  if (i < count) indices[i] = static_cast<uint16_t>(LoadIndex(codes, index_bits, i));
}

constexpr int kDifferenceBlocks = 128;

// partial [gridDim.x]: sums of squares over the elements of a block's threads, joined pairwise.
__global__ void __launch_bounds__(kThreads)
    DifferenceKernel(const void* a, const void* b, qm_dtype dtype, int64_t count, float factor,
                     float* out, double* partial) {
  double sum = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = ThreadIndex(); i < count; i += step) {
    const float difference = LoadValue(a, dtype, i) - LoadValue(b, dtype, i);
    sum += static_cast<double>(difference) * static_cast<double>(difference);
    out[i] = factor * difference;
  }
  __shared__ double shared[kThreads];
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) partial[blockIdx.x] = shared[0];
}

// ---- host side ----------------------------------------------------------------------------------
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
