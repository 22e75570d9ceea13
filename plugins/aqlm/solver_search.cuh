// The search for codes of a panel of columns (of solver.cu; CPU reference: solver_cpu.cc):
//   beam 1       a warp per four rows; lanes share out the vectors of a codebook, P of the rows
//   stays
//                in shared memory for all groups of the panel
//   larger beam  a block per row; all hypotheses in shared memory, double buffered
// Codes can differ from the CPU's where two candidates are closer than rounding.
#ifndef QUANTMILL_PLUGINS_AQLM_SOLVER_SEARCH_CUH_
#define QUANTMILL_PLUGINS_AQLM_SOLVER_SEARCH_CUH_

#include <climits>
#include <cmath>
#include <cstdint>

#include "solver_arrays.cuh"

namespace quantmill::aqlm {
namespace {

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

}  // namespace
}  // namespace quantmill::aqlm

#endif  // QUANTMILL_PLUGINS_AQLM_SOLVER_SEARCH_CUH_
