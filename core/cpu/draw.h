// Tokens drawn from rows of logits.
#ifndef QUANTMILL_CORE_CPU_DRAW_H_
#define QUANTMILL_CORE_CPU_DRAW_H_

#include <cstdint>

#include "absl/types/span.h"
#include "core/threads/thread_pool.h"

namespace quantmill::cpu {

// tokens[i]: the first v at which the sum of p = softmax(logits[i, :]) up to v exceeds uniforms[i],
// where tokens in `excluded` have no share; -1 when the row is no distribution. Sums in f64.
void DrawRows(ThreadPool& threads, const float* logits, int64_t rows, int64_t vocab,
              absl::Span<const int32_t> excluded, const double* uniforms, int32_t* tokens);

}  // namespace quantmill::cpu

#endif  // QUANTMILL_CORE_CPU_DRAW_H_
