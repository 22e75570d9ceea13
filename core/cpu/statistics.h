// What calibration measures on the inputs of linears; numerics: plugin_api/STATS.md.
#ifndef QUANTMILL_CORE_CPU_STATISTICS_H_
#define QUANTMILL_CORE_CPU_STATISTICS_H_

#include <cstdint>

#include "core/threads/thread_pool.h"

namespace quantmill::cpu {

// gram[k, k] += x^T x with x [rows, k]. `gram` is symmetric; its upper triangle is the one read.
void AccumulateGram(ThreadPool& threads, const float* x, int64_t rows, int64_t k, float* gram);
// cross[k, k] += (original - x)^T x.
void AccumulateCross(ThreadPool& threads, const float* original, const float* x, int64_t rows,
                     int64_t k, float* cross);
// sum[k] += column sums of |x|; maximum[k] = max(maximum[k], |x|). Either may be null.
void AccumulateAbs(ThreadPool& threads, const float* x, int64_t rows, int64_t k, float* sum,
                   float* maximum);

}  // namespace quantmill::cpu

#endif  // QUANTMILL_CORE_CPU_STATISTICS_H_
