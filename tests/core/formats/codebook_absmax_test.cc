#include "core/formats/codebook_absmax.h"

#include <cmath>
#include <limits>

#include "core/formats/reference.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace quantmill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Type = CodebookAbsmaxParams::Type;

Tensor Bytes(std::vector<uint8_t> values) {
  Tensor t = *Tensor::Host(DType::kU8, {static_cast<int64_t>(values.size())});
  std::copy(values.begin(), values.end(), t.as<uint8_t>());
  return t;
}

Tensor Floats(std::vector<float> values) {
  return Tensor::FromF32({static_cast<int64_t>(values.size())}, values);
}

// Three rows of 11: 33 weights, so two blocks of 32 and an odd end. Code c stands for c / 8 - 1.
PackedWeight Weight() {
  PackedWeight weight;
  weight.format_id = std::string(kCodebookAbsmaxId);
  weight.format_json = R"({"block_size":32,"dtype":"bf16","type":"nf4"})";
  weight.out_features = 3;
  weight.in_features = 11;
  std::vector<uint8_t> codes(17, 0x88);
  codes[0] = 0xC4;   // weights 0 and 1: codes 12 and 4
  codes[15] = 0x8F;  // weight 31: code 15
  codes[16] = 0x03;  // weight 32: code 0; the low half means nothing
  std::vector<float> codebook;
  for (int c = 0; c < 16; ++c) codebook.push_back(static_cast<float>(c) / 8.0f - 1.0f);
  weight.tensors = {
      {"codes", Bytes(codes)}, {"absmax", Floats({2.0f, 0.5f})}, {"codebook", Floats(codebook)}};
  return weight;
}

std::vector<float> Dense(const PackedWeight& weight) {
  Tensor out = *Tensor::Host(DType::kF32, {weight.out_features, weight.in_features});
  const absl::Status status = DequantizeWithReference(weight, &out);
  EXPECT_TRUE(status.ok()) << status;
  return {out.as<float>(), out.as<float>() + out.elements()};
}

TEST(CodebookAbsmax, TakesTheHighHalfFirstAndBlocksAcrossRows) {
  const std::vector<float> w = Dense(Weight());
  ASSERT_EQ(w.size(), 33u);
  EXPECT_THAT(std::vector<float>(w.begin(), w.begin() + 3), ElementsAre(1.0f, -1.0f, 0.0f));
  EXPECT_EQ(w[31], 1.75f);
  EXPECT_EQ(w[32], -0.5f);
}

TEST(CodebookAbsmax, RestoresQuantizedFactors) {
  PackedWeight weight = Weight();
  weight.format_json = R"({"block_size":32,"dtype":"f32","nested_block_size":1,"type":"nf4"})";
  std::vector<float> values(256);
  values[3] = 0.5f;
  values[200] = -0.25f;
  weight.tensors[1].tensor = Bytes({3, 200});
  weight.tensors.push_back({"nested_absmax", Floats({2.0f, 4.0f})});
  weight.tensors.push_back({"nested_codebook", Floats(values)});
  weight.tensors.push_back({"absmax_offset", Floats({3.0f})});
  const std::vector<float> w = Dense(weight);
  EXPECT_EQ(w[0], 0.5f * (0.5f * 2.0f + 3.0f));
  EXPECT_EQ(w[32], -1.0f * (-0.25f * 4.0f + 3.0f));
}

TEST(CodebookAbsmax, RoundsOnceToTheDtypeAskedFor) {
  PackedWeight weight = Weight();
  weight.tensors[1].tensor = Floats({1.0f / 3.0f, 0.5f});
  Tensor half = *Tensor::Host(DType::kF16, {3, 11});
  ASSERT_TRUE(DequantizeCodebookAbsmaxReference(weight, &half).ok());
  EXPECT_EQ(half.as<uint16_t>()[0], F32ToF16(0.5f * (1.0f / 3.0f)));
  Tensor wrong = *Tensor::Host(DType::kF32, {11, 3});
  EXPECT_FALSE(DequantizeCodebookAbsmaxReference(weight, &wrong).ok());
}

TEST(CodebookAbsmax, ParametersRoundTripAndOtherTextIsRefused) {
  for (const char* text :
       {R"({"block_size":64,"dtype":"bf16","type":"nf4"})",
        R"({"block_size":4096,"dtype":"f32","type":"fp4"})",
        R"({"block_size":32,"dtype":"f16","nested_block_size":256,"type":"nf4"})"}) {
    const auto params = ParseCodebookAbsmaxJson(text);
    ASSERT_TRUE(params.ok()) << params.status();
    EXPECT_EQ(CodebookAbsmaxJson(*params), text);
  }
  for (const char* text : {"", "[]", R"({"block_size":"64","dtype":"bf16","type":"nf4"})",
                           R"({"block_size":16,"dtype":"bf16","type":"nf4"})",
                           R"({"block_size":96,"dtype":"bf16","type":"nf4"})",
                           R"({"block_size":64,"dtype":"f64","type":"nf4"})",
                           R"({"block_size":64,"dtype":"bf16","type":"int4"})",
                           R"({"block_size":64,"dtype":"bf16","nested_block_size":0,"type":"nf4"})",
                           R"({"block_size":64,"dtype":"bf16","more":1,"type":"nf4"})",
                           R"({"block_size": 64,"dtype":"bf16","type":"nf4"})",
                           R"({"type":"nf4","block_size":64,"dtype":"bf16"})"}) {
    EXPECT_EQ(ParseCodebookAbsmaxJson(text).status().code(), absl::StatusCode::kInvalidArgument)
        << text;
  }
}

TEST(CodebookAbsmax, SaysWhichTensorIsWrong) {
  const auto error = [](const PackedWeight& weight) {
    return std::string(CheckCodebookAbsmax(weight).message());
  };
  EXPECT_EQ(error(Weight()), "");
  PackedWeight weight = Weight();
  weight.tensors.erase(weight.tensors.begin() + 1);
  EXPECT_THAT(error(weight), HasSubstr("'absmax'"));
  weight = Weight();
  weight.tensors[0].tensor = Bytes(std::vector<uint8_t>(16));
  EXPECT_THAT(error(weight), HasSubstr("[17]"));
  weight = Weight();
  weight.tensors[1].tensor = Floats({1.0f, std::numeric_limits<float>::infinity()});
  EXPECT_THAT(error(weight), HasSubstr("element 1 of 'absmax'"));
  weight = Weight();
  weight.tensors.push_back(weight.tensors[0]);
  EXPECT_THAT(error(weight), HasSubstr("'codes'"));
  weight = Weight();
  weight.out_features = 0;
  EXPECT_THAT(error(weight), HasSubstr("positive"));
}

}  // namespace
}  // namespace quantmill
