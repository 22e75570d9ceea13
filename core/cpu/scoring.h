// Negative log likelihood and KL divergence per row of logits.
#ifndef QUANTMILL_CORE_CPU_SCORING_H_
#define QUANTMILL_CORE_CPU_SCORING_H_

#include <cstdint>

#include "core/threads/thread_pool.h"

namespace quantmill::cpu {

// nll[i] = logsumexp(logits[i]) - logits[i, targets[i]]; argmax[i]: lowest index of the largest.
void ScoreRows(ThreadPool& threads, const float* logits, int64_t rows, int64_t vocab,
               const int32_t* targets, float* nll, int32_t* argmax);
// kl[i] = sum_v p (log p - log q), p = softmax(reference[i]), q = softmax(logits[i]).
void KlRows(ThreadPool& threads, const float* reference, const float* logits, int64_t rows,
            int64_t vocab, float* kl);

}  // namespace quantmill::cpu

#endif  // QUANTMILL_CORE_CPU_SCORING_H_
