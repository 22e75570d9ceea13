// RMS normalisation and rotary position embedding.
#ifndef QUANTMILL_CORE_CPU_NORM_ROPE_H_
#define QUANTMILL_CORE_CPU_NORM_ROPE_H_

#include <cstdint>

#include "core/threads/thread_pool.h"

namespace quantmill::cpu {

// out = x / sqrt(mean(x^2) + eps) * weight for each of `runs` runs of `width` elements. In place
// allowed.
void RmsNorm(ThreadPool& threads, const float* x, int64_t runs, int64_t width, const float* weight,
             float eps, float* out);

struct RopeShape {
  int64_t rows, heads, head_dim;
  int64_t first_position, length;  // row r has position first_position + r % length
};
// Rotates in place the pairs (x[i], x[i + head_dim / 2]) of each head. cosine, sine: [positions,
// head_dim / 2].
void Rope(ThreadPool& threads, const float* cosine, const float* sine, const RopeShape& shape,
          float* x);

}  // namespace quantmill::cpu

#endif  // QUANTMILL_CORE_CPU_NORM_ROPE_H_
