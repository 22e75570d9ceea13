// Scoring of logits. CPU references: ScoreRows, KlRows of core/cpu.
#ifndef QUANTMILL_CORE_CUDA_SCORE_CUH_
#define QUANTMILL_CORE_CUDA_SCORE_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/tensor/dtype.h"

namespace quantmill::cuda {

// nll[r] = logsumexp(logits[r, :]) - logits[r, targets[r]]; argmax[r] = lowest index of the
// maximum. logits: [rows, vocab] of dtype; targets in [0, vocab); all on the device.
cudaError_t LaunchScoreRows(const void* logits, DType dtype, const int32_t* targets, int64_t rows,
                            int64_t vocab, float* nll, int32_t* argmax, cudaStream_t stream);

// kl[r] = sum_v p_v (log p_v - log q_v), p = softmax(reference[r]), q = softmax(logits[r]).
cudaError_t LaunchKlRows(const void* reference, DType reference_dtype, const void* logits,
                         DType logits_dtype, int64_t rows, int64_t vocab, float* kl,
                         cudaStream_t stream);

}  // namespace quantmill::cuda

#endif  // QUANTMILL_CORE_CUDA_SCORE_CUH_
