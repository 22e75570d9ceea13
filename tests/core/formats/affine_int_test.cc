#include "core/formats/affine_int.h"

#include <cmath>
#include <limits>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace quantmill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Zero = AffineIntParams::Zero;

std::vector<uint32_t> Packed(std::vector<uint8_t> values, int bits) {
  std::vector<int32_t> words(PackedWords(values.size(), bits));
  PackBits(values.data(), values.size(), bits, words.data());
  return {words.begin(), words.end()};
}

std::vector<uint8_t> Counting(int count, int modulus) {
  std::vector<uint8_t> values(count);
  for (int i = 0; i < count; ++i) values[i] = i % modulus;
  return values;
}

// Vectors of the layouts other programs write (gptqmodel, compressed-tensors).
TEST(BitStream, EqualsTheWordsOfOtherPrograms) {
  EXPECT_THAT(Packed(Counting(8, 8), 4), ElementsAre(0x76543210u));
  EXPECT_THAT(Packed(Counting(16, 4), 2), ElementsAre(0xE4E4E4E4u));
  EXPECT_THAT(Packed({1, 2, 3, 4}, 8), ElementsAre(0x04030201u));
  EXPECT_THAT(Packed(Counting(32, 8), 3), ElementsAre(0x88FAC688u, 0xC688FAC6u, 0xFAC688FAu));
  // int4 values -4..3, stored with 8 added.
  EXPECT_THAT(Packed({4, 5, 6, 7, 8, 9, 10, 11}, 4), ElementsAre(0xBA987654u));
}

TEST(BitStream, UnpacksWhatItPacked) {
  std::mt19937 random(1);
  for (int bits : {1, 2, 3, 4, 8}) {
    for (int count : {1, 7, 31, 32, 33, 100}) {
      std::vector<uint8_t> values(count), back(count);
      for (auto& value : values) value = random() & ((1 << bits) - 1);
      std::vector<int32_t> words(PackedWords(count, bits));
      PackBits(values.data(), count, bits, words.data());
      UnpackBits(words.data(), count, bits, back.data());
      EXPECT_EQ(values, back) << bits << " bits, " << count;
    }
  }
}

TEST(AffineIntJson, RoundTripsAndRefusesOtherText) {
  for (const char* text : {R"({"bits":4,"group_size":128,"zero":"int"})",
                           R"({"bits":2,"group_size":-1,"zero":"none"})",
                           R"({"bits":8,"group_size":32,"zero":"float"})",
                           R"({"axis":0,"bits":1,"group_size":32,"zero":"float"})",
                           R"({"bits":2,"group_size":16,"scale":"q8","zero":"q8"})"}) {
    const auto params = ParseAffineIntJson(text);
    ASSERT_TRUE(params.ok()) << params.status();
    EXPECT_EQ(AffineIntJson(*params), text);
  }
  for (const char* text :
       {"", "[]", "{", R"({"bits":5,"group_size":128,"zero":"int"})",
        R"({"bits":"4","group_size":128,"zero":"int"})", R"({"bits":4,"zero":"int"})",
        R"({"bits":4,"group_size":0,"zero":"int"})", R"({"bits":4,"group_size":-2,"zero":"int"})",
        R"({"bits":4,"group_size":128})", R"({"bits":4,"group_size":128,"zero":"maybe"})",
        R"({"bits":4294967300,"group_size":128,"zero":"int"})",
        R"({"bits":4,"group_size":128,"zero":"int","x":1})",
        R"({"bits":1,"group_size":128,"zero":"int"})",
        R"({"axis":1,"bits":4,"group_size":128,"zero":"float"})",
        R"({"axis":"0","bits":4,"group_size":128,"zero":"float"})",
        R"({"bits":4,"group_size":128,"scale":"f16","zero":"float"})",
        R"({"bits": 4, "group_size":128,"zero":"int"})",
        R"({"group_size":128,"bits":4,"zero":"int"})"}) {
    EXPECT_EQ(ParseAffineIntJson(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
}

// Two rows, four channels, two groups.
PackedWeight Small(Zero zero) {
  auto codes = *Tensor::Host(DType::kU8, {2, 4});
  for (int i = 0; i < 8; ++i) codes.as<uint8_t>()[i] = 2 * i;
  Tensor zeros;
  if (zero == Zero::kInt) {
    zeros = *Tensor::Host(DType::kU8, {2, 2});
    for (int i = 0; i < 4; ++i) zeros.as<uint8_t>()[i] = i;
  } else if (zero == Zero::kFloat) {
    zeros = Tensor::FromF32({2, 2}, {0.5f, 1.5f, -2.0f, 7.25f});
  }
  auto weight = MakeAffineInt({4, 2, zero}, codes, Tensor::FromF32({2, 2}, {1, 0.5f, 2, 0.25f}),
                              zeros, Tensor());
  EXPECT_TRUE(weight.ok()) << weight.status();
  return *weight;
}

std::vector<float> AffineValues(const PackedWeight& weight) {
  Tensor out = *Tensor::Host(DType::kF32, {weight.out_features, weight.in_features});
  const auto status = DequantizeAffineIntReference(weight, &out);
  EXPECT_TRUE(status.ok()) << status;
  return {out.as<float>(), out.as<float>() + out.elements()};
}

TEST(Reference, MatchesNumbersWorkedOutByHand) {
  EXPECT_THAT(AffineValues(Small(Zero::kNone)), ElementsAre(-8, -6, -2, -1, 0, 4, 1, 1.5f));
  EXPECT_THAT(AffineValues(Small(Zero::kInt)), ElementsAre(0, 2, 1.5f, 2.5f, 12, 16, 2.25f, 2.75f));
  EXPECT_THAT(AffineValues(Small(Zero::kFloat)),
              ElementsAre(-0.5f, 1.5f, 1.25f, 2.25f, 20, 24, 1.1875f, 1.6875f));
}

TEST(Reference, FollowsTheGroupIndex) {
  PackedWeight weight = Small(Zero::kInt);
  weight.tensors.push_back({"group_index", Tensor::FromI32({4}, {1, 0, 1, 0})});
  EXPECT_THAT(AffineValues(weight), ElementsAre(-0.5f, 2, 1.5f, 6, 1.25f, 16, 2.25f, 24));
}

// Four rows, three channels, groups of two along the outputs: rows r and r + 2 share.
TEST(Reference, GroupsAlongTheOutputs) {
  auto codes = *Tensor::Host(DType::kU8, {4, 3});
  for (int i = 0; i < 12; ++i) codes.as<uint8_t>()[i] = i % 2;
  auto weight =
      MakeAffineInt({1, 2, Zero::kFloat, 0}, codes, Tensor::FromF32({2, 3}, {1, 2, 4, 8, 16, 32}),
                    Tensor::FromF32({2, 3}, {0, 0, 0.5f, 1, 1, 1}), Tensor());
  ASSERT_TRUE(weight.ok()) << weight.status();
  EXPECT_EQ(weight->format_json, R"({"axis":0,"bits":1,"group_size":2,"zero":"float"})");
  EXPECT_THAT(AffineValues(*weight), ElementsAre(0, 2, -2, 0, -16, 0, 0, 2, -2, 0, -16, 0));
  weight->tensors.push_back({"group_index", Tensor::FromI32({3}, {0, 0, 0})});
  EXPECT_THAT(CheckAffineInt(*weight).message(), HasSubstr("group_index"));
}

// 130 groups: the last two scales have a range of their own.
TEST(Reference, ReadsScalesAndZeroPointsStoredAsBytes) {
  auto codes = *Tensor::Host(DType::kU8, {130, 1});
  auto scale = *Tensor::Host(DType::kU8, {130, 1}), zero = *Tensor::Host(DType::kU8, {130, 1});
  for (int i = 0; i < 130; ++i) {
    codes.as<uint8_t>()[i] = 3;
    scale.as<uint8_t>()[i] = i;
    zero.as<uint8_t>()[i] = 2 * i % 256;
  }
  const AffineIntParams params = {2, -1, Zero::kQ8, 1, true};
  const Tensor ranges = Tensor::FromF32({2, 2}, {0.25f, 1, 0.5f, 2});
  const Tensor zero_range = Tensor::FromF32({1, 2}, {0.125f, -1});
  auto weight = MakeAffineInt(params, codes, scale, zero, Tensor(), ranges, zero_range);
  ASSERT_TRUE(weight.ok()) << weight.status();
  const std::vector<float> got = AffineValues(*weight);
  EXPECT_EQ(got[0], 1.0f * (3 - -1.0f));
  EXPECT_EQ(got[127], (1 + 0.25f * 127) * (3 - (0.125f * 254 - 1)));
  EXPECT_EQ(got[129], (2 + 0.5f * 129) * (3 - (0.125f * 2 - 1)));
  EXPECT_EQ(weight->bytes(), 4 * 130 + 2 * 130 + 16 + 8);
  const auto without =
      MakeAffineInt(params, codes, scale, zero, Tensor(), Tensor(), zero_range).status();
  EXPECT_THAT(without.message(), HasSubstr("scale_range"));
  const auto negative = MakeAffineInt(params, codes, scale, zero, Tensor(),
                                      Tensor::FromF32({2, 2}, {0.25f, 1, 0.5f, -70}), zero_range);
  EXPECT_THAT(negative.status().message(), HasSubstr("positive"));
}

TEST(Reference, RoundsOnceToTheDtypeAskedFor) {
  PackedWeight weight = Small(Zero::kFloat);
  const std::vector<float> exact = AffineValues(weight);
  for (DType dtype : {DType::kF16, DType::kBF16}) {
    Tensor out = *Tensor::Host(dtype, {2, 4});
    ASSERT_TRUE(DequantizeAffineIntReference(weight, &out).ok());
    for (int i = 0; i < 8; ++i) {
      EXPECT_EQ(out.as<uint16_t>()[i],
                dtype == DType::kF16 ? F32ToF16(exact[i]) : F32ToBF16(exact[i]));
    }
  }
  Tensor wrong = *Tensor::Host(DType::kF32, {4, 2});
  EXPECT_EQ(DequantizeAffineIntReference(weight, &wrong).code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(PackedWeight, CountsAllBits) {
  const PackedWeight weight = Small(Zero::kInt);
  // Two words of codes, four F32 scales, four zero points: 8 + 16 + 4 bytes over 8 weights.
  EXPECT_EQ(weight.bytes(), 28);
  EXPECT_DOUBLE_EQ(weight.BitsPerWeight(), 28.0);
  EXPECT_EQ(weight.Find("nothing"), nullptr);
}

void ExpectRefused(const PackedWeight& weight, const char* text) {
  const absl::Status status = CheckAffineInt(weight);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr(text));
}

TEST(Check, RefusesWrongStructure) {
  PackedWeight weight = Small(Zero::kInt);
  weight.format_id = "qm.fmt.other/1";
  ExpectRefused(weight, "qm.fmt.other/1");

  weight = Small(Zero::kInt);
  weight.tensors.erase(weight.tensors.begin());
  ExpectRefused(weight, "no tensor 'codes'");

  weight = Small(Zero::kInt);
  weight.tensors.push_back({"extra", Tensor::FromI32({1}, {0})});
  ExpectRefused(weight, "'extra'");

  weight = Small(Zero::kInt);
  weight.tensors.push_back(weight.tensors[1]);
  ExpectRefused(weight, "two tensors 'scale'");

  weight = Small(Zero::kInt);
  weight.format_json = AffineIntJson({4, 2, Zero::kNone});
  ExpectRefused(weight, "'zero'");

  weight = Small(Zero::kInt);
  weight.format_json = AffineIntJson({4, 3, Zero::kInt});
  ExpectRefused(weight, "does not divide");

  weight = Small(Zero::kInt);
  weight.format_json = AffineIntJson({4, 4, Zero::kInt});
  ExpectRefused(weight, "shape [2, 2]");

  weight = Small(Zero::kInt);
  weight.tensors[1].tensor = Tensor::FromI32({2, 2}, {1, 1, 1, 1});
  ExpectRefused(weight, "dtype I32");

  weight = Small(Zero::kInt);
  weight.in_features = 0;
  ExpectRefused(weight, "positive");
}

TEST(Check, RefusesWrongValues) {
  for (float bad : {0.0f, -1.0f, std::numeric_limits<float>::infinity(), std::nanf("")}) {
    PackedWeight weight = Small(Zero::kInt);
    weight.tensors[1].tensor.as<float>()[3] = bad;
    ExpectRefused(weight, "scale of row 1, group 1");
  }
  PackedWeight weight = Small(Zero::kInt);
  weight.tensors[2].tensor.as<uint8_t>()[2] = 16;
  ExpectRefused(weight, "zero point of row 1, group 0 is 16; it must be 0..15");

  weight = Small(Zero::kFloat);
  weight.tensors[2].tensor.as<float>()[0] = std::nanf("");
  ExpectRefused(weight, "finite");

  weight = Small(Zero::kNone);
  weight.tensors.push_back({"group_index", Tensor::FromI32({4}, {0, 0, 2, 1})});
  ExpectRefused(weight, "group_index of channel 2 is 2");

  weight = Small(Zero::kNone);
  weight.tensors[0].tensor.as<int32_t>()[1] |= 1 << 16;
  ExpectRefused(weight, "codes of row 1");
}

TEST(Make, RefusesCodesThatDoNotFit) {
  auto codes = *Tensor::Host(DType::kU8, {1, 2});
  codes.as<uint8_t>()[0] = 4;
  codes.as<uint8_t>()[1] = 0;
  const auto weight =
      MakeAffineInt({2, -1, Zero::kNone}, codes, Tensor::FromF32({1, 1}, {1}), Tensor(), Tensor());
  EXPECT_THAT(std::string(weight.status().message()), HasSubstr("code 4"));
}

}  // namespace
}  // namespace quantmill
