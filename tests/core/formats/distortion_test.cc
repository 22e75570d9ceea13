#include "core/formats/distortion.h"

#include <cmath>
#include <limits>

#include "gtest/gtest.h"

namespace quantmill {
namespace {

TEST(Distortion, MatchesNumbersWorkedOutByHand) {
  // r = (3, 4), a = (3, 3): |r|^2 = 25, error 1, dot 21, |a|^2 = 18.
  const auto result = MeasureDistortion(Tensor::FromF32({2}, {3, 4}), Tensor::FromF32({2}, {3, 3}));
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(result->count, 2);
  EXPECT_DOUBLE_EQ(result->nmse(), 1.0 / 25);
  EXPECT_DOUBLE_EQ(result->max_error, 1.0);
  EXPECT_NEAR(result->snr_db(), 13.9794, 1e-4);
  EXPECT_DOUBLE_EQ(result->cosine(), 21 / (5 * std::sqrt(18.0)));
  EXPECT_TRUE(result->finite);
}

TEST(Distortion, DefinesTheLimits) {
  Distortion nothing;
  EXPECT_EQ(nothing.nmse(), 0);
  EXPECT_EQ(nothing.cosine(), 1);
  EXPECT_TRUE(std::isinf(nothing.snr_db()));
  Distortion invented;
  invented.Add(0, 1);
  EXPECT_TRUE(std::isinf(invented.nmse()));
  EXPECT_EQ(invented.cosine(), 0);
  Distortion exact;
  exact.Add(2, 2);
  EXPECT_EQ(exact.nmse(), 0);
  EXPECT_EQ(exact.cosine(), 1);
}

TEST(Distortion, MergingEqualsAddingAll) {
  Distortion all, left, right;
  for (int i = 0; i < 8; ++i) {
    const double r = i - 3, a = r + 0.5;
    all.Add(r, a);
    (i < 3 ? left : right).Add(r, a);
  }
  left.Merge(right);
  EXPECT_EQ(left.count, all.count);
  EXPECT_DOUBLE_EQ(left.nmse(), all.nmse());
  EXPECT_DOUBLE_EQ(left.cosine(), all.cosine());
  EXPECT_EQ(left.max_error, all.max_error);
}

TEST(Distortion, ReportsWhatIsNotFinite) {
  Distortion result;
  result.Add(1, std::numeric_limits<double>::quiet_NaN());
  EXPECT_FALSE(result.finite);
}

TEST(Distortion, ReadsHalfTypesAndRefusesOthers) {
  auto half = Tensor::Host(DType::kF16, {2});
  auto brain = Tensor::Host(DType::kBF16, {2});
  ASSERT_TRUE(half.ok() && brain.ok());
  for (int i = 0; i < 2; ++i) {
    half->as<uint16_t>()[i] = F32ToF16(1.5f + i);
    brain->as<uint16_t>()[i] = F32ToBF16(1.5f + i);
  }
  const auto equal = MeasureDistortion(*half, *brain);
  ASSERT_TRUE(equal.ok());
  EXPECT_EQ(equal->error_energy, 0);
  EXPECT_EQ(MeasureDistortion(*half, Tensor::FromI32({2}, {1, 2})).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(MeasureDistortion(*half, Tensor::FromF32({1}, {1})).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace quantmill
