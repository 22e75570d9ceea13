#include "core/cpu/scoring.h"

#include <algorithm>
#include <cmath>

namespace quantmill::cpu {
namespace {

double LogSumExp(const float* row, int64_t n, float maximum) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(row[i] - maximum);
  return maximum + std::log(sum);
}

float KlRow(const float* p, const float* q, int64_t n) {
  const float p_max = *std::max_element(p, p + n);
  const float q_max = *std::max_element(q, q + n);
  const double shift = LogSumExp(q, n, q_max) - LogSumExp(p, n, p_max);
  double weighted = 0, total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double weight = std::exp(p[i] - p_max);
    total += weight;
    weighted += weight * (static_cast<double>(p[i]) - static_cast<double>(q[i]));
  }
  return static_cast<float>(weighted / total + shift);
}

}  // namespace

void ScoreRows(ThreadPool& threads, const float* logits, int64_t rows, int64_t vocab,
               const int32_t* targets, float* nll, int32_t* argmax) {
  threads.ParallelFor(rows, 1, [=](int64_t row, int64_t, int) {
    const float* values = logits + row * vocab;
    const float* largest = std::max_element(values, values + vocab);
    argmax[row] = static_cast<int32_t>(largest - values);
    nll[row] = static_cast<float>(LogSumExp(values, vocab, *largest) - values[targets[row]]);
  });
}

void KlRows(ThreadPool& threads, const float* reference, const float* logits, int64_t rows,
            int64_t vocab, float* kl) {
  threads.ParallelFor(rows, 1, [=](int64_t row, int64_t, int) {
    kl[row] = KlRow(reference + row * vocab, logits + row * vocab, vocab);
  });
}

}  // namespace quantmill::cpu
