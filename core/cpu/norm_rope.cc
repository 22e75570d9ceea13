#include "core/cpu/norm_rope.h"

#include <algorithm>
#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/cpu/norm_rope.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Must come after foreach_target.h.
#include "core/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quantmill::cpu {
namespace HWY_NAMESPACE {

float SumOfSquares(const float* x, int64_t n) {
  const F32 d;
  const int64_t lanes = F32Lanes();
  VecF32 even = hn::Zero(d), odd = hn::Zero(d);
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    const VecF32 a = hn::LoadU(d, x + i), b = hn::LoadU(d, x + i + lanes);
    even = hn::MulAdd(a, a, even);
    odd = hn::MulAdd(b, b, odd);
  }
  float sum = Sum(d, hn::Add(even, odd));
  for (; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

void NormRuns(const float* x, int64_t runs, int64_t width, const float* weight, float eps,
              float* out) {
  const F32 d;
  const int64_t lanes = F32Lanes();
  for (int64_t run = 0; run < runs; ++run) {
    const float* from = x + run * width;
    float* to = out + run * width;
    const float mean = SumOfSquares(from, width) / static_cast<float>(width);
    const float scale = 1.0f / std::sqrt(mean + eps);
    const VecF32 scales = hn::Set(d, scale);
    int64_t i = 0;
    for (; i + lanes <= width; i += lanes) {
      const VecF32 scaled = hn::Mul(hn::LoadU(d, from + i), scales);
      hn::StoreU(hn::Mul(scaled, hn::LoadU(d, weight + i)), d, to + i);
    }
    for (; i < width; ++i) to[i] = from[i] * scale * weight[i];
  }
}

// One head: pairs (low[i], high[i]) turned by the angle with cosine c[i] and sine s[i].
void RotateHead(const float* c, const float* s, int64_t half, float* low, float* high) {
  const F32 d;
  const int64_t lanes = F32Lanes();
  int64_t i = 0;
  for (; i + lanes <= half; i += lanes) {
    const VecF32 cos = hn::LoadU(d, c + i), sin = hn::LoadU(d, s + i);
    const VecF32 a = hn::LoadU(d, low + i), b = hn::LoadU(d, high + i);
    hn::StoreU(hn::Sub(hn::Mul(a, cos), hn::Mul(b, sin)), d, low + i);
    hn::StoreU(hn::Add(hn::Mul(b, cos), hn::Mul(a, sin)), d, high + i);
  }
  for (; i < half; ++i) {
    const float a = low[i], b = high[i];
    low[i] = a * c[i] - b * s[i];
    high[i] = b * c[i] + a * s[i];
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace quantmill::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantmill::cpu {
namespace {

HWY_EXPORT(NormRuns);
HWY_EXPORT(RotateHead);

// Elements per range: enough to pay for handing the range to a thread.
constexpr int64_t kElements = 16384;

int64_t Grain(int64_t width) {
  return std::max<int64_t>(1, kElements / std::max<int64_t>(1, width));
}

}  // namespace

void RmsNorm(ThreadPool& threads, const float* x, int64_t runs, int64_t width, const float* weight,
             float eps, float* out) {
  const auto kernel = HWY_DYNAMIC_DISPATCH(NormRuns);
  threads.ParallelFor(runs, Grain(width), [=](int64_t begin, int64_t end, int) {
    kernel(x + begin * width, end - begin, width, weight, eps, out + begin * width);
  });
}

void Rope(ThreadPool& threads, const float* cosine, const float* sine, const RopeShape& shape,
          float* x) {
  const auto kernel = HWY_DYNAMIC_DISPATCH(RotateHead);
  const int64_t half = shape.head_dim / 2;
  const int64_t width = shape.heads * shape.head_dim;
  threads.ParallelFor(shape.rows, Grain(width), [=](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t position = shape.first_position + row % shape.length;
      for (int64_t head = 0; head < shape.heads; ++head) {
        float* low = x + row * width + head * shape.head_dim;
        kernel(cosine + position * half, sine + position * half, half, low, low + half);
      }
    }
  });
}

}  // namespace quantmill::cpu
#endif  // HWY_ONCE
