#include "core/cpu/elementwise.h"

#include <algorithm>
#include <cmath>

namespace quantmill::cpu {
namespace {

constexpr int64_t kElements = 16384;  // per range; as in norm_rope.cc

}  // namespace

void SiluMultiply(ThreadPool& threads, const float* gate, const float* up, int64_t n, float* out) {
  threads.ParallelFor(n, kElements, [=](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    }
  });
}

void Add(ThreadPool& threads, const float* x, int64_t n, float* target) {
  threads.ParallelFor(n, kElements, [=](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) target[i] += x[i];
  });
}

void AddBias(ThreadPool& threads, const float* bias, int64_t rows, int64_t width, float* x) {
  const int64_t grain = std::max<int64_t>(1, kElements / std::max<int64_t>(1, width));
  threads.ParallelFor(rows, grain, [=](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = 0; i < width; ++i) x[row * width + i] += bias[i];
    }
  });
}

}  // namespace quantmill::cpu
