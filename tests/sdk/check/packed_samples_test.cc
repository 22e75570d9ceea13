#include "sdk/check/packed_samples.h"

#include "core/formats/affine_int.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace quantmill::check {
namespace {

using ::testing::HasSubstr;

PackedWeight Weight(uint8_t first_code) {
  Tensor codes = *Tensor::HostZeros(DType::kU8, {2, 8});
  codes.as<uint8_t>()[0] = first_code;
  const Tensor scale = Tensor::FromF32({2, 1}, {0.5f, 0.25f});
  return *MakeAffineInt({4, -1, AffineIntParams::Zero::kNone}, codes, scale, Tensor(), Tensor());
}

TEST(PackedDifference, SaysNothingOfEqualWeightsInAnyOrder) {
  PackedWeight other = Weight(3);
  std::swap(other.tensors[0], other.tensors[1]);
  EXPECT_EQ(PackedDifference(Weight(3), other), "");
}

TEST(PackedDifference, NamesTheFirstDifference) {
  const PackedWeight weight = Weight(3);
  EXPECT_THAT(PackedDifference(weight, Weight(4)), HasSubstr("'codes' differs from byte 0 of 8"));
  PackedWeight other = Weight(3);
  other.format_json = "{}";
  EXPECT_THAT(PackedDifference(weight, other), HasSubstr("against qm.fmt.affine-int/1 {}"));
  other = Weight(3);
  other.out_features = 3;
  EXPECT_THAT(PackedDifference(weight, other), HasSubstr("[2, 8] against [3, 8]"));
  other = Weight(3);
  other.tensors[1].name = "scales";
  EXPECT_THAT(PackedDifference(weight, other), HasSubstr("'scale' is missing"));
  other = Weight(3);
  other.tensors[1].tensor = *Tensor::HostZeros(DType::kF16, {2, 1});
  EXPECT_THAT(PackedDifference(weight, other), HasSubstr("another dtype or shape"));
}

}  // namespace
}  // namespace quantmill::check
