#include "core/cpu/elementwise.h"

#include <algorithm>
#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/cpu/elementwise.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Must come after foreach_target.h.
#include "core/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quantmill::cpu {
namespace HWY_NAMESPACE {

// Below this silu(x) is 0 to within 1e-36; the exponential of its negative would overflow.
constexpr float kLowestSilu = -87.0f;

HWY_INLINE VecF32 Silu(F32 d, VecF32 x) {
  const VecF32 exponential = hn::Exp(d, hn::Neg(hn::Max(x, hn::Set(d, kLowestSilu))));
  return hn::Div(x, hn::Add(hn::Set(d, 1.0f), exponential));
}

void SiluMultiplyRange(const float* gate, const float* up, int64_t n, float* out) {
  const F32 d;
  const int64_t lanes = F32Lanes();
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const VecF32 product = hn::Mul(Silu(d, hn::LoadU(d, gate + i)), hn::LoadU(d, up + i));
    hn::StoreU(product, d, out + i);
  }
  if (i == n) return;
  // The rest goes through the same vector code, so that a value does not depend on its place.
  HWY_ALIGN float tail[HWY_MAX_BYTES / sizeof(float)] = {};
  std::copy(gate + i, gate + n, tail);
  hn::Store(Silu(d, hn::Load(d, tail)), d, tail);
  for (int64_t j = i; j < n; ++j) out[j] = tail[j - i] * up[j];
}

void AddRange(const float* x, int64_t n, float* target) {
  const F32 d;
  const int64_t lanes = F32Lanes();
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(hn::Add(hn::LoadU(d, target + i), hn::LoadU(d, x + i)), d, target + i);
  }
  for (; i < n; ++i) target[i] += x[i];
}

}  // namespace HWY_NAMESPACE
}  // namespace quantmill::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantmill::cpu {
namespace {

HWY_EXPORT(SiluMultiplyRange);
HWY_EXPORT(AddRange);

constexpr int64_t kElements = 16384;  // per range; as in norm_rope.cc

}  // namespace

void SiluMultiply(ThreadPool& threads, const float* gate, const float* up, int64_t n, float* out) {
  const auto kernel = HWY_DYNAMIC_DISPATCH(SiluMultiplyRange);
  threads.ParallelFor(n, kElements, [=](int64_t begin, int64_t end, int) {
    kernel(gate + begin, up + begin, end - begin, out + begin);
  });
}

void Add(ThreadPool& threads, const float* x, int64_t n, float* target) {
  const auto kernel = HWY_DYNAMIC_DISPATCH(AddRange);
  threads.ParallelFor(n, kElements, [=](int64_t begin, int64_t end, int) {
    kernel(x + begin, end - begin, target + begin);
  });
}

void AddBias(ThreadPool& threads, const float* bias, int64_t rows, int64_t width, float* x) {
  const auto kernel = HWY_DYNAMIC_DISPATCH(AddRange);
  const int64_t grain = std::max<int64_t>(1, kElements / std::max<int64_t>(1, width));
  threads.ParallelFor(rows, grain, [=](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) kernel(bias, width, x + row * width);
  });
}

}  // namespace quantmill::cpu
#endif  // HWY_ONCE
