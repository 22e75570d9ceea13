// Operations on single elements.
#ifndef QUANTMILL_CORE_CPU_ELEMENTWISE_H_
#define QUANTMILL_CORE_CPU_ELEMENTWISE_H_

#include <cstdint>

#include "core/threads/thread_pool.h"

namespace quantmill::cpu {

// out = silu(gate) * up over n elements; out may be gate or up.
void SiluMultiply(ThreadPool& threads, const float* gate, const float* up, int64_t n, float* out);
// target += x over n elements.
void Add(ThreadPool& threads, const float* x, int64_t n, float* target);
// x[r, :] += bias for every row.
void AddBias(ThreadPool& threads, const float* bias, int64_t rows, int64_t width, float* x);

}  // namespace quantmill::cpu

#endif  // QUANTMILL_CORE_CPU_ELEMENTWISE_H_
