#include "core/cpu/convert.h"

#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/cpu/convert.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// Must come after foreach_target.h.
#include "core/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quantmill::cpu {
namespace HWY_NAMESPACE {

template <class Element>
void Widen(const Element* source, int64_t n, float* target) {
  const F32 d;
  const int64_t lanes = F32Lanes();
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(LoadF32(d, source + i), d, target + i);
  for (; i < n; ++i) target[i] = ScalarF32(source[i]);
}

void WidenBF16(const uint16_t* source, int64_t n, float* target) {
  Widen(reinterpret_cast<const BF16Element*>(source), n, target);
}
void WidenF16(const uint16_t* source, int64_t n, float* target) {
  Widen(reinterpret_cast<const F16Element*>(source), n, target);
}

// Adds half a unit of the kept bits, less one if they are even; NaN becomes quiet instead.
void NarrowBF16(const float* source, int64_t n, uint16_t* target) {
  const F32 d;
  const hn::Repartition<uint32_t, F32> du;
  const hn::Repartition<int32_t, F32> di;
  const hn::Rebind<uint16_t, F32> d16;
  const int64_t lanes = F32Lanes();
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto value = hn::LoadU(d, source + i);
    const auto bits = hn::BitCast(du, value);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
    const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7FFF))));
    const auto quiet = hn::Or(hn::ShiftRight<16>(bits), hn::Set(du, 0x40));
    const auto kept = hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(value)), quiet, rounded);
    hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di, kept)), d16, target + i);
  }
  for (; i < n; ++i) target[i] = F32ToBF16(source[i]);
}

void NarrowF16(const float* source, int64_t n, uint16_t* target) {
  int64_t i = 0;
#if QM_HAVE_F16C
  const F32 d;
  const hn::Rebind<hwy::float16_t, F32> d16;
  const int64_t lanes = F32Lanes();
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(hn::DemoteTo(d16, hn::LoadU(d, source + i)), d16,
               reinterpret_cast<hwy::float16_t*>(target + i));
  }
#endif
  for (; i < n; ++i) target[i] = F32ToF16(source[i]);
}

}  // namespace HWY_NAMESPACE
}  // namespace quantmill::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace quantmill::cpu {

HWY_EXPORT(WidenBF16);
HWY_EXPORT(WidenF16);
HWY_EXPORT(NarrowBF16);
HWY_EXPORT(NarrowF16);

void ToF32(const void* source, DType dtype, int64_t n, float* target) {
  if (n == 0) return;
  if (dtype == DType::kF32) {
    std::memcpy(target, source, static_cast<size_t>(n) * sizeof(float));
  } else if (dtype == DType::kBF16) {
    HWY_DYNAMIC_DISPATCH(WidenBF16)(static_cast<const uint16_t*>(source), n, target);
  } else {
    HWY_DYNAMIC_DISPATCH(WidenF16)(static_cast<const uint16_t*>(source), n, target);
  }
}

void FromF32(const float* source, int64_t n, DType dtype, void* target) {
  if (n == 0) return;
  if (dtype == DType::kF32) {
    std::memcpy(target, source, static_cast<size_t>(n) * sizeof(float));
  } else if (dtype == DType::kBF16) {
    HWY_DYNAMIC_DISPATCH(NarrowBF16)(source, n, static_cast<uint16_t*>(target));
  } else {
    HWY_DYNAMIC_DISPATCH(NarrowF16)(source, n, static_cast<uint16_t*>(target));
  }
}

std::vector<float> F32Values(const Tensor& tensor) {
  std::vector<float> values(static_cast<size_t>(tensor.elements()));
  ToF32(tensor.data(), tensor.dtype(), tensor.elements(), values.data());
  return values;
}

}  // namespace quantmill::cpu
#endif  // HWY_ONCE
