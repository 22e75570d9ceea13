#include "core/cpu/draw.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/base/draw.h"

namespace quantmill::cpu {
namespace {

// `weights` is scratch memory of vocab elements.
int32_t DrawRow(const float* logits, int64_t vocab, absl::Span<const int32_t> excluded,
                double uniform, std::vector<double>* weights) {
  weights->assign(logits, logits + vocab);
  for (int32_t id : excluded) {
    if (id >= 0 && id < vocab) {
      (*weights)[static_cast<size_t>(id)] = -std::numeric_limits<double>::infinity();
    }
  }
  const double largest = *std::max_element(weights->begin(), weights->end());
  double total = 0;
  for (double& weight : *weights) total += weight = std::exp(weight - largest);
  if (!std::isfinite(total)) return -1;
  return IndexAt(*weights, uniform * total);
}

}  // namespace

void DrawRows(ThreadPool& threads, const float* logits, int64_t rows, int64_t vocab,
              absl::Span<const int32_t> excluded, const double* uniforms, int32_t* tokens) {
  threads.ParallelFor(rows, 1, [&](int64_t begin, int64_t end, int) {
    std::vector<double> weights;
    for (int64_t row = begin; row < end; ++row) {
      tokens[row] = DrawRow(logits + row * vocab, vocab, excluded, uniforms[row], &weights);
    }
  });
}

}  // namespace quantmill::cpu
