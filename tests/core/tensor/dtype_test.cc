#include "core/tensor/dtype.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "gtest/gtest.h"

namespace quantmill {
namespace {

// The value of a 16-bit float by definition: sign, exponent and fraction fields.
double ValueOf(uint16_t bits, int fraction_bits, int bias) {
  const int exponent_bits = 15 - fraction_bits;
  const int exponent = (bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
}

TEST(DTypeTest, EveryF16AndBF16HasItsValue) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float f16 = F16ToF32(half), bf16 = BF16ToF32(half);
    const double expected_f16 = ValueOf(half, 10, 15), expected_bf16 = ValueOf(half, 7, 127);
    if (std::isnan(expected_f16)) {
      ASSERT_TRUE(std::isnan(f16)) << bits;
      ASSERT_TRUE(std::isnan(F16ToF32(F32ToF16(f16)))) << bits;
    } else {
      ASSERT_EQ(static_cast<double>(f16), expected_f16) << bits;
      ASSERT_EQ(F32ToF16(f16), half);  // also the sign of zero
    }
    if (std::isnan(expected_bf16)) {
      ASSERT_TRUE(std::isnan(bf16)) << bits;
      ASSERT_TRUE(std::isnan(BF16ToF32(F32ToBF16(bf16)))) << bits;
    } else {
      ASSERT_EQ(static_cast<double>(bf16), expected_bf16) << bits;
      ASSERT_EQ(F32ToBF16(bf16), half);
    }
  }
}

// Between two neighbours a and b, the midpoint goes to the even one and everything else to the
// nearer one.
template <class ToF32, class FromF32>
void CheckRounding(uint16_t largest_finite, ToF32 to_f32, FromF32 from_f32) {
  for (uint32_t low = 0; low < largest_finite; ++low) {
    const auto a = static_cast<uint16_t>(low), b = static_cast<uint16_t>(low + 1);
    const float middle =
        static_cast<float>((static_cast<double>(to_f32(a)) + static_cast<double>(to_f32(b))) / 2);
    const uint16_t even = a % 2 == 0 ? a : b;
    ASSERT_EQ(from_f32(middle), even) << low;
    ASSERT_EQ(from_f32(std::nextafter(middle, 0.0f)), a) << low;
    ASSERT_EQ(from_f32(std::nextafter(middle, INFINITY)), b) << low;
    ASSERT_EQ(from_f32(-middle), even | 0x8000) << low;
  }
}

TEST(DTypeTest, RoundsToNearestEven) {
  CheckRounding(0x7BFF, F16ToF32, F32ToF16);
  CheckRounding(0x7F7F, BF16ToF32, F32ToBF16);
}

TEST(DTypeTest, OverflowAndInfinity) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(F32ToF16(65504.0f), 0x7BFF);
  EXPECT_EQ(F32ToF16(std::nextafter(65520.0f, 0.0f)), 0x7BFF);
  EXPECT_EQ(F32ToF16(65520.0f), 0x7C00);
  EXPECT_EQ(F32ToF16(-1e30f), 0xFC00);
  EXPECT_EQ(F32ToF16(infinity), 0x7C00);
  EXPECT_EQ(F32ToBF16(-infinity), 0xFF80);
  EXPECT_EQ(F32ToBF16(std::numeric_limits<float>::max()), 0x7F80);
  // A NaN whose payload is in the bits that are cut off stays a NaN.
  EXPECT_TRUE(std::isnan(BF16ToF32(F32ToBF16(std::bit_cast<float>(0x7F800001u)))));
  EXPECT_TRUE(std::isnan(F16ToF32(F32ToF16(std::bit_cast<float>(0xFF800001u)))));
}

#ifdef __FLT16_MANT_DIG__
// The compiler's own conversion, on a spread of all bit patterns.
TEST(DTypeTest, AgreesWithTheCompiler) {
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 4099) {
    const float value = std::bit_cast<float>(static_cast<uint32_t>(bits));
    if (std::isnan(value)) continue;
    ASSERT_EQ(F32ToF16(value), std::bit_cast<uint16_t>(static_cast<_Float16>(value))) << value;
  }
}
#endif

TEST(DTypeTest, NamesAndSizes) {
  const DType all[] = {DType::kF32,    DType::kF16,    DType::kBF16, DType::kF64,
                       DType::kF8E4M3, DType::kF8E5M2, DType::kI8,   DType::kU8,
                       DType::kI16,    DType::kI32,    DType::kI64};
  for (const DType dtype : all) {
    EXPECT_EQ(DTypeFromName(DTypeName(dtype)), dtype);
    EXPECT_GT(ElementSize(dtype), 0);
  }
  EXPECT_EQ(DTypeName(DType::kF8E4M3), "F8_E4M3");
  EXPECT_EQ(DTypeFromName("BOOL"), std::nullopt);
  EXPECT_EQ(DTypeFromName(""), std::nullopt);
  EXPECT_TRUE(IsModelFloat(DType::kBF16));
  EXPECT_FALSE(IsModelFloat(DType::kF64));
}

}  // namespace
}  // namespace quantmill
