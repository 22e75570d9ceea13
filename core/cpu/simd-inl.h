// Vector functions shared by the kernels of this folder; compiled once per instruction set. Files
// that include this follow the scheme of Highway's quick reference: hwy/foreach_target.h compiles
// the part inside HWY_NAMESPACE for every instruction set, HWY_DYNAMIC_DISPATCH picks one at run
// time.
#if defined(QUANTMILL_CORE_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUANTMILL_CORE_CPU_SIMD_INL_H_
#undef QUANTMILL_CORE_CPU_SIMD_INL_H_
#else
#define QUANTMILL_CORE_CPU_SIMD_INL_H_
#endif

#include <cstdint>

#include "core/tensor/dtype.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

// Instruction sets that convert f16 in hardware. Highway's emulation for the others does not round
// to nearest even and turns infinities into numbers.
#undef QM_HAVE_F16C
#if HWY_TARGET <= HWY_AVX2
#define QM_HAVE_F16C 1
#else
#define QM_HAVE_F16C 0
#endif

HWY_BEFORE_NAMESPACE();
namespace quantmill::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using F32 = hn::ScalableTag<float>;
using VecF32 = hn::Vec<F32>;

HWY_INLINE int64_t F32Lanes() { return static_cast<int64_t>(hn::Lanes(F32())); }

// Elements of a model dtype; the two 16-bit types are told apart by their C++ type.
struct BF16Element {
  uint16_t bits;
};
struct F16Element {
  uint16_t bits;
};

HWY_INLINE float ScalarF32(float value) { return value; }
HWY_INLINE float ScalarF32(BF16Element value) { return BF16ToF32(value.bits); }
HWY_INLINE float ScalarF32(F16Element value) { return F16ToF32(value.bits); }

// One vector of elements at `from` (any alignment) as f32.
HWY_INLINE VecF32 LoadF32(F32 d, const float* from) { return hn::LoadU(d, from); }
HWY_INLINE VecF32 LoadF32(F32 d, const BF16Element* from) {
  const hn::Rebind<hwy::bfloat16_t, F32> d16;
  return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::bfloat16_t*>(from)));
}
HWY_INLINE VecF32 LoadF32(F32 d, const F16Element* from) {
#if QM_HAVE_F16C
  const hn::Rebind<hwy::float16_t, F32> d16;
  return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(from)));
#else
  HWY_ALIGN float values[HWY_MAX_BYTES / sizeof(float)];
  for (size_t i = 0; i < hn::Lanes(d); ++i) values[i] = F16ToF32(from[i].bits);
  return hn::Load(d, values);
#endif
}

// e^x for x <= 88; 1 unit in the last place (hwy/contrib/math). NaN stays NaN, where Highway's
// function gives 0 and would hide it.
HWY_INLINE VecF32 ExpKeepNaN(F32 d, VecF32 x) {
  return hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(d, x));
}

HWY_INLINE float Sum(F32 d, VecF32 v) { return hn::GetLane(hn::SumOfLanes(d, v)); }
HWY_INLINE float Maximum(F32 d, VecF32 v) { return hn::GetLane(hn::MaxOfLanes(d, v)); }

}  // namespace HWY_NAMESPACE
}  // namespace quantmill::cpu
HWY_AFTER_NAMESPACE();

#endif  // include guard per instruction set
