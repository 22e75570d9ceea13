// y = x W^T for one to eight rows of x: generation, where reading the weights is the work.
#ifndef QUANTMILL_CORE_CPU_LINEAR_FEW_ROWS_H_
#define QUANTMILL_CORE_CPU_LINEAR_FEW_ROWS_H_

#include <cstdint>

#include "core/tensor/dtype.h"
#include "core/threads/thread_pool.h"

namespace quantmill::cpu {

inline constexpr int64_t kFewRows = 8;

// As Linear in linear.h, with 1 <= rows <= kFewRows. Every weight is read once, in its own dtype.
void LinearFewRows(ThreadPool& threads, const float* x, int64_t rows, int64_t k, const void* weight,
                   DType weight_dtype, int64_t n, const float* bias, float* out);

}  // namespace quantmill::cpu

#endif  // QUANTMILL_CORE_CPU_LINEAR_FEW_ROWS_H_
