// Blocks of GGUF files: bytes worked out from the reference, round trips, blocks of other programs.
#include "affine_test_util.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace affine_testing {
namespace {

using ::testing::HasSubstr;
using Zero = AffineIntParams::Zero;
using qm::testing::FakeCall;

struct GgufLayer {
  FakeCall call;
  const qm_named_tensor* tensors = nullptr;
  uint64_t count = 0;
  const char* config = nullptr;
  qm_status status = QM_OK;

  explicit GgufLayer(const PackedWeight& weight) {
    status = Format()->to_checkpoint(call.get(), "gguf", "layer", View(weight).get(), &tensors,
                                     &count, &config);
  }
};

// One row of 32 weights whose codes count up from 0, modulo 2^bits.
PackedWeight Counting(int bits, Zero zero, float scale, int zero_point) {
  Tensor codes = *Tensor::Host(DType::kU8, {1, 32});
  for (int i = 0; i < 32; ++i) codes.as<uint8_t>()[i] = static_cast<uint8_t>(i % (1 << bits));
  Tensor scales = *Tensor::Host(DType::kF16, {1, 1});
  StoreFloat(&scales, 0, scale);
  Tensor zeros;
  if (zero == Zero::kInt) {
    zeros = *Tensor::Host(DType::kU8, {1, 1});
    zeros.as<uint8_t>()[0] = static_cast<uint8_t>(zero_point);
  }
  return *quantmill::MakeAffineInt({bits, 32, zero}, codes, scales, zeros, Tensor());
}

TEST(Gguf, WritesTheBlocksOfTheReference) {
  GgufLayer q8(Counting(8, Zero::kNone, 0.5f, 0));
  ASSERT_EQ(q8.status, QM_OK) << q8.call.error();
  EXPECT_STREQ(q8.config, R"({"type":"Q8_0"})");
  std::vector<uint8_t> bytes = q8.call.Read<uint8_t>(0, "weight");
  ASSERT_EQ(bytes.size(), 34u);
  EXPECT_EQ(bytes[0] | bytes[1] << 8, 0x3800);  // 0.5 in f16
  for (int i = 0; i < 32; ++i) EXPECT_EQ(static_cast<int8_t>(bytes[2 + i]), i - 128);

  GgufLayer q4(Counting(4, Zero::kNone, 2.0f, 0));
  ASSERT_EQ(q4.status, QM_OK) << q4.call.error();
  EXPECT_STREQ(q4.config, R"({"type":"Q4_0"})");
  bytes = q4.call.Read<uint8_t>(0, "weight");
  ASSERT_EQ(bytes.size(), 18u);
  EXPECT_EQ(bytes[0] | bytes[1] << 8, 0x4000);
  for (int j = 0; j < 16; ++j) EXPECT_EQ(bytes[2 + j], j | j << 4);

  GgufLayer shifted(Counting(4, Zero::kInt, 2.0f, 3));
  ASSERT_EQ(shifted.status, QM_OK) << shifted.call.error();
  EXPECT_STREQ(shifted.config, R"({"type":"Q4_1"})");
  bytes = shifted.call.Read<uint8_t>(0, "weight");
  ASSERT_EQ(bytes.size(), 20u);
  EXPECT_EQ(bytes[2] | bytes[3] << 8, 0xC600);  // -6
  EXPECT_EQ(bytes[4 + 7], 7 | 7 << 4);
}

PackedWeight FromBlocks(const char* type, const std::vector<uint8_t>& blocks, int64_t rows,
                        std::string* error) {
  Tensor weight = *Tensor::Host(DType::kU8, {rows, static_cast<int64_t>(blocks.size()) / rows});
  std::memcpy(weight.data(), blocks.data(), blocks.size());
  const qm_named_tensor named = {"weight", weight.View()};
  FakeCall call;
  qm_packed packed = {};
  const std::string config = std::string("{\"type\":\"") + type + "\"}";
  if (Format()->from_checkpoint(call.get(), "gguf", "layer", &named, 1, config.c_str(), &packed) !=
      QM_OK) {
    *error = call.error();
    return {};
  }
  PackedWeight result = {
      packed.format_id, packed.format_json, {}, packed.out_features, packed.in_features};
  for (uint64_t i = 0; i < packed.tensor_count; ++i) {
    const qm_tensor& t = packed.tensors[i].tensor;
    Tensor copy = *Tensor::Host(static_cast<DType>(t.dtype),
                                quantmill::Shape(absl::Span<const int64_t>(t.shape, t.rank)));
    std::memcpy(copy.data(), t.data, static_cast<size_t>(copy.bytes()));
    result.tensors.push_back({packed.tensors[i].name, copy});
  }
  return result;
}

std::vector<float> Values(const PackedWeight& weight) {
  Tensor dense = *Tensor::Host(DType::kF32, {weight.out_features, weight.in_features});
  const absl::Status status = quantmill::DequantizeAffineIntReference(weight, &dense);
  EXPECT_TRUE(status.ok()) << status;
  return {dense.as<float>(), dense.as<float>() + dense.elements()};
}

std::vector<uint8_t> Block(std::vector<uint16_t> halves, const std::vector<uint8_t>& codes) {
  std::vector<uint8_t> block;
  for (const uint16_t half : halves) {
    block.push_back(static_cast<uint8_t>(half & 255));
    block.push_back(static_cast<uint8_t>(half >> 8));
  }
  block.insert(block.end(), codes.begin(), codes.end());
  return block;
}

// llama.cpp's Q4_0 has a negative scale where the largest weight is positive.
TEST(Gguf, ReadsBlocksWithNegativeScales) {
  std::vector<uint8_t> codes(16);
  for (int j = 0; j < 16; ++j) codes[j] = static_cast<uint8_t>(j | (15 - j) << 4);
  std::string error;
  const PackedWeight four = FromBlocks("Q4_0", Block({0xBC00}, codes), 1, &error);  // d = -1
  ASSERT_EQ(error, "");
  const std::vector<float> values = Values(four);
  for (int j = 0; j < 16; ++j) {
    EXPECT_EQ(values[j], -(j - 8.0f));
    EXPECT_EQ(values[j + 16], -((15 - j) - 8.0f));
  }
  std::vector<uint8_t> bytes(32);
  for (int j = 0; j < 32; ++j) bytes[j] = static_cast<uint8_t>(j * 8 - 128);
  const std::vector<float> eight = Values(FromBlocks("Q8_0", Block({0xB800}, bytes), 1, &error));
  ASSERT_EQ(error, "");
  for (int j = 0; j < 32; ++j) EXPECT_EQ(eight[j], -0.5f * static_cast<float>(j * 8 - 128));
  const std::vector<float> one =
      Values(FromBlocks("Q4_1", Block({0xBC00, 0x4000}, codes), 1, &error));
  for (int j = 0; j < 16; ++j) EXPECT_EQ(one[j], 2.0f - static_cast<float>(j));
}

TEST(Gguf, ReadsBlocksWithoutScaleAndMinimaThatAreNoZeroPoints) {
  std::string error;
  const std::vector<uint8_t> codes(16, 0x5A);
  for (const float value : Values(FromBlocks("Q4_0", Block({0x8000}, codes), 1, &error))) {
    EXPECT_EQ(value, 0.0f);
  }
  for (const float value : Values(FromBlocks("Q4_1", Block({0, 0x3C00}, codes), 1, &error))) {
    EXPECT_EQ(value, 1.0f);
  }
  const PackedWeight odd = FromBlocks("Q4_1", Block({0x3C00, 0xB800}, codes), 1, &error);
  EXPECT_THAT(odd.format_json, HasSubstr("\"zero\":\"float\""));
  EXPECT_EQ(Values(odd)[0], 9.5f);
  EXPECT_EQ(Values(odd)[16], 4.5f);
}

TEST(Gguf, RefusesDamagedLayers) {
  std::string error;
  const std::vector<uint8_t> codes(16);
  FromBlocks("Q4_0", Block({0x7C00}, codes), 1, &error);
  EXPECT_THAT(error, HasSubstr("no finite number"));
  FromBlocks("Q4_1", Block({0x3C00, 0x7E00}, codes), 1, &error);
  EXPECT_THAT(error, HasSubstr("no finite number"));
  FromBlocks("Q4_0", codes, 1, &error);
  EXPECT_THAT(error, HasSubstr("whole blocks"));
  FromBlocks("Q4_K", Block({0}, codes), 1, &error);
  EXPECT_THAT(error, HasSubstr("none of Q8_0, Q4_0 and Q4_1"));
}

TEST(Gguf, GivesBackWhatItWrote) {
  for (const AffineIntParams& params :
       {AffineIntParams{8, 32, Zero::kNone}, AffineIntParams{4, 32, Zero::kNone},
        AffineIntParams{4, 32, Zero::kInt}}) {
    const PackedWeight weight = RandomWeight({7, 96, params}, 3);
    GgufLayer layer(weight);
    ASSERT_EQ(layer.status, QM_OK) << layer.call.error();
    const std::string config = layer.config;
    std::string error;
    const std::string type = config.substr(9, 4);
    const PackedWeight back =
        FromBlocks(type.c_str(), layer.call.Read<uint8_t>(0, "weight"), 7, &error);
    ASSERT_EQ(error, "");
    EXPECT_EQ(back.format_json, weight.format_json);
    EXPECT_EQ(Values(back), Values(weight));
  }
}

TEST(Gguf, SaysWhichOptionsWouldFit) {
  const auto refusal = [](const char* json, int64_t in) {
    FakeCall call;
    EXPECT_EQ(Format()->can_store(call.get(), "gguf", json, 8, in), QM_FAILED_PRECONDITION) << json;
    return std::string(call.error());
  };
  EXPECT_THAT(refusal(R"({"bits":4,"group_size":128,"zero":"none"})", 128),
              HasSubstr("use group_size: 32"));
  EXPECT_THAT(refusal(R"({"bits":4,"group_size":-1,"zero":"none"})", 128),
              HasSubstr("use group_size: 32"));
  EXPECT_THAT(refusal(R"({"bits":3,"group_size":32,"zero":"none"})", 128),
              HasSubstr("use bits: 4 or 8"));
  EXPECT_THAT(refusal(R"({"bits":8,"group_size":32,"zero":"int"})", 128),
              HasSubstr("symmetric: true"));
  EXPECT_THAT(refusal(R"({"bits":4,"group_size":32,"zero":"float"})", 128),
              HasSubstr("quantize with ptq or gptq"));
  FakeCall call;
  EXPECT_EQ(
      Format()->can_store(call.get(), "gguf", R"({"bits":4,"group_size":32,"zero":"int"})", 8, 64),
      QM_OK);
}

}  // namespace
}  // namespace affine_testing
