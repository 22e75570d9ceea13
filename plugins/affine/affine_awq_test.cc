// The awq checkpoint layout: bytes worked out from its description, round trips, damaged layers.
#include "affine_test_util.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace affine_testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Zero = AffineIntParams::Zero;
using qm::testing::FakeCall;

struct AwqLayer {
  FakeCall call;
  const qm_named_tensor* tensors = nullptr;
  uint64_t count = 0;
  const char* config = nullptr;
  qm_status status = QM_OK;

  explicit AwqLayer(const PackedWeight& weight) {
    status = Format()->to_checkpoint(call.get(), "awq", "layer", View(weight).get(), &tensors,
                                     &count, &config);
  }
  std::vector<qm_named_tensor> Tensors() const { return {tensors, tensors + count}; }
  std::vector<uint32_t> Words(const char* name) {
    const std::vector<int32_t> words = call.Read<int32_t>(0, name);
    return {words.begin(), words.end()};
  }
};

qm_status ReadBack(const std::vector<qm_named_tensor>& tensors, const std::string& config,
                   FakeCall* call, qm_packed* out) {
  return Format()->from_checkpoint(call->get(), "awq", "layer", tensors.data(), tensors.size(),
                                   config.c_str(), out);
}

// 16 outputs, 2 inputs in groups of 1: code o + i of (o, i) mod 16, zero point o mod 16, scale
// 1 + o + 16 g.
PackedWeight Counting() {
  Tensor codes = *Tensor::Host(DType::kU8, {16, 2});
  Tensor scale = *Tensor::Host(DType::kF16, {16, 2});
  Tensor zero = *Tensor::Host(DType::kU8, {16, 2});
  for (int o = 0; o < 16; ++o) {
    for (int i = 0; i < 2; ++i) {
      codes.as<uint8_t>()[o * 2 + i] = static_cast<uint8_t>((o + i) % 16);
      zero.as<uint8_t>()[o * 2 + i] = static_cast<uint8_t>(o);
      StoreFloat(&scale, o * 2 + i, static_cast<float>(1 + o + 16 * i));
    }
  }
  return *quantmill::MakeAffineInt({4, 1, Zero::kInt}, codes, scale, zero, Tensor());
}

TEST(Awq, WritesTheWordsOfTheReferenceVector) {
  AwqLayer layer(Counting());
  ASSERT_EQ(layer.status, QM_OK) << layer.call.error();
  // Codes 0 .. 7 of outputs 0 .. 7, 8 .. 15 behind; then 1 .. 8 and 9 .. 15, 0.
  EXPECT_THAT(layer.Words("qweight"),
              ElementsAre(0x75316420u, 0xFDB9ECA8u, 0x86427531u, 0x0ECAFDB9u));
  EXPECT_THAT(layer.Words("qzeros"),
              ElementsAre(0x75316420u, 0xFDB9ECA8u, 0x75316420u, 0xFDB9ECA8u));
  const std::vector<qm::F16> scales = layer.call.Read<qm::F16>(0, "scales");
  ASSERT_EQ(scales.size(), 32u);
  for (int g = 0; g < 2; ++g) {
    for (int o = 0; o < 16; ++o) {
      EXPECT_EQ(qm::ToFloat(scales[static_cast<size_t>(g * 16 + o)]), 1.0f + o + 16 * g);
    }
  }
  EXPECT_STREQ(layer.config, R"({"bits":4,"group_size":1,"zero_point":true})");
  EXPECT_EQ(layer.call.EmittedTensor(0, "qweight").shape[0], 2);
  EXPECT_EQ(layer.call.EmittedTensor(0, "qweight").shape[1], 2);
}

TEST(Awq, SymmetricWeightsGetTheMiddleAsZeroPoint) {
  AwqLayer layer(RandomWeight({8, 64, {4, 32, Zero::kNone}}));
  ASSERT_EQ(layer.status, QM_OK) << layer.call.error();
  EXPECT_THAT(layer.Words("qzeros"), ElementsAre(0x88888888u, 0x88888888u));
}

TEST(Awq, GivesTheWeightBackBitForBit) {
  for (int64_t group : {-1, 32, 64}) {
    for (Zero zero : {Zero::kNone, Zero::kInt}) {
      const PackedWeight weight = RandomWeight({40, 192, {4, group, zero}});
      SCOPED_TRACE(weight.format_json);
      AwqLayer layer(weight);
      ASSERT_EQ(layer.status, QM_OK) << layer.call.error();
      FakeCall call;
      qm_packed back;
      ASSERT_EQ(ReadBack(layer.Tensors(), layer.config, &call, &back), QM_OK) << call.error();
      EXPECT_EQ(weight.format_json, back.format_json);
      ASSERT_EQ(weight.tensors.size(), back.tensor_count);
      for (uint64_t i = 0; i < back.tensor_count; ++i) {
        const Tensor* tensor = weight.Find(back.tensors[i].name);
        ASSERT_NE(tensor, nullptr);
        const qm_tensor& got = back.tensors[i].tensor;
        EXPECT_EQ(std::memcmp(tensor->data(), got.data, static_cast<size_t>(tensor->bytes())), 0)
            << back.tensors[i].name;
      }
    }
  }
}

TEST(Awq, AFileThatSaysItHasNoZeroPointsKeepsThoseItHas) {
  const PackedWeight weight = RandomWeight({16, 64, {4, 32, Zero::kInt}});
  AwqLayer layer(weight);
  FakeCall call;
  qm_packed back;
  ASSERT_EQ(
      ReadBack(layer.Tensors(), R"({"bits":4,"group_size":32,"zero_point":false})", &call, &back),
      QM_OK)
      << call.error();
  EXPECT_EQ(weight.format_json, back.format_json);
}

TEST(Awq, SaysWhatItCannotHold) {
  const auto store = [](const char* json, int64_t out) {
    FakeCall call;
    const qm_status status = Format()->can_store(call.get(), "awq", json, out, 256);
    EXPECT_EQ(call.error().empty(), status == QM_OK);
    return call.error();
  };
  EXPECT_EQ(store(R"({"bits":4,"group_size":128,"zero":"int"})", 64), "");
  EXPECT_EQ(store(R"({"bits":4,"group_size":-1,"zero":"none"})", 8), "");
  EXPECT_THAT(store(R"({"bits":3,"group_size":128,"zero":"int"})", 64), HasSubstr("4-bit"));
  EXPECT_THAT(store(R"({"bits":4,"group_size":128,"zero":"int"})", 60), HasSubstr("multiples"));
  EXPECT_THAT(store(R"({"bits":4,"group_size":128,"zero":"float"})", 64), HasSubstr("integer"));
  AwqLayer act_order(RandomWeight({32, 64, {4, 32, Zero::kInt}, DType::kF16, true}));
  EXPECT_EQ(act_order.status, QM_FAILED_PRECONDITION);
  EXPECT_THAT(act_order.call.error(), HasSubstr("static_groups"));
  AwqLayer brain(RandomWeight({32, 64, {4, 32, Zero::kInt}, DType::kBF16}));
  EXPECT_EQ(brain.status, QM_FAILED_PRECONDITION);
  EXPECT_THAT(brain.call.error(), HasSubstr("F16"));
}

TEST(Awq, RefusesDamagedLayers) {
  AwqLayer layer(RandomWeight({32, 64, {4, 32, Zero::kInt}}));
  const std::vector<qm_named_tensor> good = layer.Tensors();
  const auto read = [](const std::vector<qm_named_tensor>& tensors, const std::string& config) {
    FakeCall call;
    qm_packed back;
    const qm_status status = ReadBack(tensors, config, &call, &back);
    EXPECT_EQ(call.error().empty(), status == QM_OK);
    return status;
  };
  ASSERT_EQ(read(good, layer.config), QM_OK);
  for (const char* config : {"{}", R"({"bits":3,"group_size":32,"zero_point":true})",
                             R"({"bits":4,"group_size":48,"zero_point":true})",
                             R"({"bits":4,"group_size":64,"zero_point":true})",
                             R"({"bits":4,"group_size":0,"zero_point":true})"}) {
    EXPECT_EQ(read(good, config), QM_INVALID_ARGUMENT) << config;
  }
  for (size_t i = 0; i < good.size(); ++i) {
    SCOPED_TRACE(good[i].name);
    auto without = good;
    without.erase(without.begin() + static_cast<int64_t>(i));
    EXPECT_EQ(read(without, layer.config), QM_INVALID_ARGUMENT);
    auto wrong_type = good;
    wrong_type[i].tensor.dtype = QM_F64;
    EXPECT_EQ(read(wrong_type, layer.config), QM_INVALID_ARGUMENT);
    auto wrong_shape = good;
    wrong_shape[i].tensor.shape[0] /= 2;
    EXPECT_EQ(read(wrong_shape, layer.config), QM_INVALID_ARGUMENT);
  }
}

}  // namespace
}  // namespace affine_testing
