#include "sdk/check/plain_rounding.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace quantmill::check {
namespace {

using ::testing::ElementsAre;

std::vector<float> Values(const Tensor& tensor) {
  return {tensor.as<float>(), tensor.as<float>() + tensor.elements()};
}

// The range is [-3, 12]: step 1, zero point 3.
TEST(RoundPlainly, AsymmetricByHand) {
  const Tensor weight = Tensor::FromF32({1, 4}, {-3.0f, 12.0f, 0.4f, 6.6f});
  EXPECT_THAT(Values(RoundPlainly(weight, {4, 4, false})), ElementsAre(-3.0f, 12.0f, 0.0f, 7.0f));
}

// Largest 7: step 1, codes -7 .. 7.
TEST(RoundPlainly, SymmetricByHand) {
  const Tensor weight = Tensor::FromF32({1, 4}, {-3.3f, 7.0f, 0.6f, -6.6f});
  EXPECT_THAT(Values(RoundPlainly(weight, {4, 4, true})), ElementsAre(-3.0f, 7.0f, 1.0f, -7.0f));
}

TEST(RoundPlainly, GroupsAreApartAndZerosStay) {
  const Tensor weight = Tensor::FromF32({2, 2}, {0.0f, 0.0f, 15.0f, 1.0f});
  EXPECT_THAT(Values(RoundPlainly(weight, {4, 2, false})), ElementsAre(0.0f, 0.0f, 15.0f, 1.0f));
}

TEST(PlainRulesWithin, CountsEveryStoredBit) {
  // 4 + 24/128: the asymmetric rounding of group 128, which is better than symmetric ones there.
  const std::vector<PlainRule> rules = PlainRulesWithin(4.1875, 512);
  ASSERT_EQ(rules.size(), 1u);
  EXPECT_EQ(rules[0].ToString(), "4 bits, group 128, asymmetric");
  // 4 + 16/128: zero points fit in groups of 256 only.
  const std::vector<PlainRule> lean = PlainRulesWithin(4.125, 512);
  ASSERT_EQ(lean.size(), 2u);
  EXPECT_EQ(lean[0].ToString(), "4 bits, group 256, asymmetric");
  EXPECT_EQ(lean[1].ToString(), "4 bits, group 128, symmetric");
  for (const PlainRule& rule : lean) EXPECT_LE(rule.bits_per_weight(), 4.125);
}

TEST(PlainRulesWithin, NothingFitsBelowOneBit) {
  EXPECT_TRUE(PlainRulesWithin(0.9, 512).empty());
  EXPECT_EQ(PlainRulesWithin(100.0, 512)[0].bits, 8);
}

}  // namespace
}  // namespace quantmill::check
