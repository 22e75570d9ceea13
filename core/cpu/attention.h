// Causal grouped-query attention on the CPU.
#ifndef QUANTMILL_CORE_CPU_ATTENTION_H_
#define QUANTMILL_CORE_CPU_ATTENTION_H_

#include <cstdint>

#include "core/tensor/backend.h"
#include "core/threads/thread_pool.h"

namespace quantmill::cpu {

// q, out: [batch * query_length, heads * head_dim]; keys, values: [batch * capacity, kv_heads *
// head_dim]. The shape is already checked.
void Attention(ThreadPool& threads, const AttentionShape& shape, int64_t capacity, const float* q,
               const float* keys, const float* values, float* out);

}  // namespace quantmill::cpu

#endif  // QUANTMILL_CORE_CPU_ATTENTION_H_
