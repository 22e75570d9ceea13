#include "core/cpu/norm_rope.h"

#include <algorithm>
#include <cmath>

namespace quantmill::cpu {
namespace {

// Elements per range: enough to pay for handing the range to a thread.
constexpr int64_t kElements = 16384;

int64_t Grain(int64_t width) {
  return std::max<int64_t>(1, kElements / std::max<int64_t>(1, width));
}

}  // namespace

void RmsNorm(ThreadPool& threads, const float* x, int64_t runs, int64_t width, const float* weight,
             float eps, float* out) {
  threads.ParallelFor(runs, Grain(width), [=](int64_t begin, int64_t end, int) {
    for (int64_t run = begin; run < end; ++run) {
      const float* from = x + run * width;
      float* to = out + run * width;
      float sum = 0;
      for (int64_t i = 0; i < width; ++i) sum += from[i] * from[i];
      const float scale = 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
      for (int64_t i = 0; i < width; ++i) to[i] = from[i] * scale * weight[i];
    }
  });
}

void Rope(ThreadPool& threads, const float* cosine, const float* sine, const RopeShape& shape,
          float* x) {
  const int64_t half = shape.head_dim / 2;
  const int64_t width = shape.heads * shape.head_dim;
  threads.ParallelFor(shape.rows, Grain(width), [=](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t position = shape.first_position + row % shape.length;
      const float* c = cosine + position * half;
      const float* s = sine + position * half;
      for (int64_t head = 0; head < shape.heads; ++head) {
        float* low = x + row * width + head * shape.head_dim;
        float* high = low + half;
        for (int64_t i = 0; i < half; ++i) {
          const float a = low[i], b = high[i];
          low[i] = a * c[i] - b * s[i];
          high[i] = b * c[i] + a * s[i];
        }
      }
    }
  });
}

}  // namespace quantmill::cpu
