// Routing of a mixture of experts, and moving rows to and from experts.
#ifndef QUANTMILL_CORE_CPU_MOE_H_
#define QUANTMILL_CORE_CPU_MOE_H_

#include <cstdint>

#include "core/threads/thread_pool.h"

namespace quantmill::cpu {

// Per row: softmax over all experts, the top_k largest in falling order (lowest index first on
// ties), divided by their sum if `normalize`. indices, weights: [rows, top_k].
void RouteTopK(ThreadPool& threads, const float* logits, int64_t rows, int64_t experts,
               int64_t top_k, bool normalize, int32_t* indices, float* weights);
// out[i, :] = x[rows[i], :].
void GatherRows(ThreadPool& threads, const float* x, const int32_t* rows, int64_t n, int64_t width,
                float* out);
// target[rows[i], :] += weights[i] * x[i, :]; rows are distinct.
void ScatterAddRows(ThreadPool& threads, const float* x, const int32_t* rows, const float* weights,
                    int64_t n, int64_t width, float* target);

}  // namespace quantmill::cpu

#endif  // QUANTMILL_CORE_CPU_MOE_H_
