// The bitsandbytes layout: names, bytes and description as its reader wants them, round trips,
// files of other writers, damaged layers.
#include <cmath>
#include <cstring>

#include "flat_json.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nf4_test_util.h"
#include "nlohmann/json.hpp"

namespace nf4_testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kState[] = "weight.quant_state.bitsandbytes__nf4";

struct StoredLayer {
  FakeCall call;
  const qm_named_tensor* tensors = nullptr;
  uint64_t count = 0;
  const char* config = nullptr;
  qm_status status = QM_OK;

  explicit StoredLayer(const PackedWeight& weight) {
    status = Format().to_checkpoint(call.get(), "bitsandbytes", "layer", View(weight).get(),
                                    &tensors, &count, &config);
  }
  std::vector<qm_named_tensor> Tensors() const { return {tensors, tensors + count}; }
  std::string Text(const char* name) {
    const std::vector<uint8_t> bytes = call.Read<uint8_t>(0, name);
    return {bytes.begin(), bytes.end()};
  }
};

qm_status ReadBack(const std::vector<qm_named_tensor>& tensors, std::string* error = nullptr,
                   PackedWeight* out = nullptr) {
  FakeCall call;
  qm_packed back = {};
  const qm_status status = Format().from_checkpoint(call.get(), "bitsandbytes", "layer",
                                                    tensors.data(), tensors.size(), "{}", &back);
  EXPECT_EQ(call.error().empty(), status == QM_OK);
  if (error != nullptr) *error = call.error();
  if (out != nullptr && status == QM_OK) *out = Keep(back);
  return status;
}

TEST(Bitsandbytes, WritesWhatTheReaderLooksFor) {
  StoredLayer layer(RandomWeight(8, 64, {}));
  ASSERT_EQ(layer.status, QM_OK) << layer.call.error();
  ASSERT_EQ(layer.count, 4u);
  const qm_tensor& weight = layer.call.EmittedTensor(0, "weight");
  EXPECT_EQ(weight.rank, 2);
  EXPECT_EQ(weight.shape[0], 256);
  EXPECT_EQ(weight.shape[1], 1);
  EXPECT_EQ(layer.call.Read<float>(0, "weight.absmax").size(), 8u);
  EXPECT_EQ(layer.call.Read<float>(0, "weight.quant_map").size(), 16u);
  // Keys, order and spelling of QuantState.as_dict.
  const std::string text = layer.Text(kState);
  EXPECT_EQ(text.substr(0, text.find_last_not_of(' ') + 1),
            R"({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 64]})");
  EXPECT_STREQ(layer.config,
               R"({"compute_dtype":"bfloat16","double_quant":false,"quant_type":"nf4"})");
}

TEST(Bitsandbytes, WritesFp4WithDoubleQuantization) {
  const PackedWeight weight = RandomWeight(65, 256, {true, 64, true});  // 260 factors
  StoredLayer layer(weight);
  ASSERT_EQ(layer.status, QM_OK) << layer.call.error();
  ASSERT_EQ(layer.count, 6u);
  EXPECT_EQ(layer.call.Read<uint8_t>(0, "weight.absmax").size(), 260u);
  EXPECT_EQ(layer.call.Read<float>(0, "weight.nested_absmax").size(), 2u);
  EXPECT_EQ(layer.call.Read<float>(0, "weight.nested_quant_map").size(), 256u);
  const auto json = nlohmann::ordered_json::parse(
      layer.Text("weight.quant_state.bitsandbytes__fp4"), nullptr, /*allow_exceptions=*/false);
  std::vector<std::string> keys;
  for (const auto& [key, value] : json.items()) keys.push_back(key);
  EXPECT_THAT(keys, ElementsAre("quant_type", "blocksize", "dtype", "shape", "nested_blocksize",
                                "nested_dtype", "nested_offset"));
  EXPECT_EQ(json["nested_blocksize"], 256);
  EXPECT_EQ(json["nested_dtype"], "float32");
  EXPECT_EQ(static_cast<float>(json["nested_offset"].get<double>()),
            weight.Find("absmax_offset")->as<float>()[0]);
}

TEST(Bitsandbytes, LengthsFollowFromShapesAlone) {
  const auto length = [](int64_t rows, int64_t columns, uint32_t seed) {
    StoredLayer layer(RandomWeight(rows, columns, {false, 64, true}, seed));
    return layer.call.EmittedTensor(0, kState).shape[0];
  };
  EXPECT_EQ(length(2, 1024, 1), length(32, 64, 7));
}

TEST(Bitsandbytes, RoundTripGivesTheWeightBackBitForBit) {
  for (const ShapeCase& shape : kShapes) {
    for (const Setting& setting : Settings()) {
      const PackedWeight weight = RandomWeight(shape.rows, shape.columns, setting);
      SCOPED_TRACE(testing::Message()
                   << weight.format_json << " " << shape.rows << "x" << shape.columns);
      StoredLayer layer(weight);
      ASSERT_EQ(layer.status, QM_OK) << layer.call.error();
      PackedWeight back;
      ASSERT_EQ(ReadBack(layer.Tensors(), nullptr, &back), QM_OK);
      EXPECT_EQ(weight.format_json, back.format_json);
      EXPECT_EQ(weight.out_features, back.out_features);
      EXPECT_EQ(weight.in_features, back.in_features);
      ASSERT_EQ(weight.tensors.size(), back.tensors.size());
      for (const auto& named : back.tensors) {
        const Tensor* want = weight.Find(named.name);
        ASSERT_NE(want, nullptr) << named.name;
        ASSERT_EQ(want->dtype(), named.tensor.dtype());
        ASSERT_TRUE(want->shape() == named.tensor.shape());
        EXPECT_EQ(
            std::memcmp(want->data(), named.tensor.data(), static_cast<size_t>(want->bytes())), 0)
            << named.name;
      }
    }
  }
}

// The same tensors with another description.
std::vector<qm_named_tensor> WithState(const std::vector<qm_named_tensor>& tensors,
                                       std::string& text) {
  std::vector<qm_named_tensor> changed = tensors;
  for (qm_named_tensor& named : changed) {
    if (std::string(named.name).find("quant_state") == std::string::npos) continue;
    named.tensor.data = text.data();
    named.tensor.shape[0] = static_cast<int64_t>(text.size());
  }
  return changed;
}

TEST(Bitsandbytes, ReadsOtherSpellingsAndStorageTypes) {
  StoredLayer layer(RandomWeight(8, 64, {}));
  std::string text = R"( { "shape":[8,64],"dtype":"float16" , "blocksize": 64.0,
      "quant_type":"nf4" } )";
  PackedWeight back;
  ASSERT_EQ(ReadBack(WithState(layer.Tensors(), text), nullptr, &back), QM_OK);
  EXPECT_THAT(back.format_json, HasSubstr("\"dtype\":\"f16\""));
  std::vector<qm_named_tensor> stored = layer.Tensors();
  for (qm_named_tensor& named : stored) {
    if (std::strcmp(named.name, "weight") != 0) continue;
    named.tensor.dtype = QM_BF16;  // bnb_4bit_quant_storage
    named.tensor.shape[0] /= 2;
  }
  EXPECT_EQ(ReadBack(stored), QM_OK);
}

TEST(Bitsandbytes, RefusesDescriptionsItDoesNotUnderstand) {
  StoredLayer layer(RandomWeight(8, 64, {}));
  const auto error = [&](std::string text) {
    std::string message;
    EXPECT_EQ(ReadBack(WithState(layer.Tensors(), text), &message), QM_INVALID_ARGUMENT) << text;
    return message;
  };
  EXPECT_THAT(error(""), HasSubstr("JSON"));
  EXPECT_THAT(error("{"), HasSubstr("JSON"));
  EXPECT_THAT(error("[]"), HasSubstr("JSON"));
  EXPECT_THAT(error(R"({"quant_type": "fp4"})"), HasSubstr("quant_type"));
  EXPECT_THAT(error(R"({"quant_type": "nf4", "blocksize": 48})"), HasSubstr("blocksize"));
  EXPECT_THAT(error(R"({"quant_type": "nf4", "blocksize": 64, "dtype": "int8"})"),
              HasSubstr("dtype"));
  const std::string start = R"({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16")";
  EXPECT_THAT(error(start + "}"), HasSubstr("shape"));
  EXPECT_THAT(error(start + R"(, "shape": [8]})"), HasSubstr("shape"));
  EXPECT_THAT(error(start + R"(, "shape": [8, -64]})"), HasSubstr("shape"));
  EXPECT_THAT(error(start + R"(, "shape": [1e300, 64]})"), HasSubstr("shape"));
  EXPECT_THAT(error(start + R"(, "shape": [8, 128]})"), HasSubstr("'weight'"));
  EXPECT_THAT(error(start + R"(, "shape": [8, 64], "nested_blocksize": 256})"),
              HasSubstr("double quantization"));
}

TEST(Bitsandbytes, RefusesDamagedLayers) {
  StoredLayer layer(RandomWeight(65, 256, {false, 64, true}));
  const std::vector<qm_named_tensor> good = layer.Tensors();
  ASSERT_EQ(ReadBack(good), QM_OK);
  for (size_t i = 0; i < good.size(); ++i) {
    SCOPED_TRACE(good[i].name);
    auto without = good;
    without.erase(without.begin() + static_cast<int64_t>(i));
    EXPECT_EQ(ReadBack(without), QM_INVALID_ARGUMENT);
    auto wrong_type = good;
    wrong_type[i].tensor.dtype = QM_F64;
    EXPECT_EQ(ReadBack(wrong_type), QM_INVALID_ARGUMENT);
    auto shorter = good;
    shorter[i].tensor.shape[0] = 1;
    EXPECT_EQ(ReadBack(shorter), QM_INVALID_ARGUMENT);
  }
  const float nan = NAN;
  auto not_finite = good;
  for (qm_named_tensor& named : not_finite) {
    if (std::strcmp(named.name, "weight.quant_map") != 0) continue;
    const_cast<float*>(static_cast<const float*>(named.tensor.data))[3] = nan;
  }
  EXPECT_EQ(ReadBack(not_finite), QM_INVALID_ARGUMENT);
}

TEST(Bitsandbytes, KnowsNoOtherTarget) {
  FakeCall call;
  const char* json = R"({"block_size":64,"dtype":"bf16","type":"nf4"})";
  EXPECT_EQ(Format().can_store(call.get(), "bitsandbytes", json, 8, 64), QM_OK);
  EXPECT_NE(Format().can_store(call.get(), "gptq", json, 8, 64), QM_OK);
  EXPECT_THAT(call.error(), HasSubstr("gptq"));
}

TEST(FlatJson, TakesOneObjectOfPlainValues) {
  using quantmill::nf4::FlatJson;
  FlatJson json;
  ASSERT_TRUE(quantmill::nf4::ParseFlatJson(
      "{\"a\": \"x\\\"y\", \"b\": -1.5e2, \"c\": [1, 2], \"d\": null, \"e\": []}", &json));
  EXPECT_EQ(json["a"].text, "x\"y");
  EXPECT_EQ(json["b"].number, -150.0);
  EXPECT_THAT(json["c"].numbers, ElementsAre(1.0, 2.0));
  EXPECT_TRUE(json["e"].numbers.empty());
  EXPECT_TRUE(quantmill::nf4::ParseFlatJson(" {} ", &json));
  for (const char* bad : {"", "{", "{}x", "{\"a\"}", "{\"a\":}", "{\"a\":1,}", "{\"a\":1 \"b\":2}",
                          "{\"a\":{}}", "{\"a\":nan}", "{\"a\":1e999}", "{\"a\":\"\\u0041\"}",
                          "{\"a\":[1,]}", "{\"a\":[\"x\"]}", "{\"a\":1,\"a\":2}", "{\"a\":tru}"}) {
    EXPECT_FALSE(quantmill::nf4::ParseFlatJson(bad, &json)) << bad;
  }
}

}  // namespace
}  // namespace nf4_testing
