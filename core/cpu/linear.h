// y = x W^T on the CPU.
#ifndef QUANTMILL_CORE_CPU_LINEAR_H_
#define QUANTMILL_CORE_CPU_LINEAR_H_

#include <cstdint>

#include "core/tensor/dtype.h"
#include "core/threads/thread_pool.h"

namespace quantmill::cpu {

// out[rows, n] = x[rows, k] weight[n, k]^T + bias[n] (bias may be null). weight: F32, F16 or BF16.
void Linear(ThreadPool& threads, const float* x, int64_t rows, int64_t k, const void* weight,
            DType weight_dtype, int64_t n, const float* bias, float* out);

}  // namespace quantmill::cpu

#endif  // QUANTMILL_CORE_CPU_LINEAR_H_
