// int8-row, float8 and quantized activations: values written out from the definitions, and what the
// checks refuse.
#include <cmath>
#include <limits>

#include "core/formats/activations.h"
#include "core/formats/float8.h"
#include "core/formats/int8_row.h"
#include "core/formats/reference.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace quantmill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

Tensor Bytes(DType dtype, Shape shape, const std::vector<int>& values) {
  Tensor tensor = *Tensor::Host(dtype, shape);
  for (size_t i = 0; i < values.size(); ++i) {
    static_cast<uint8_t*>(tensor.data())[i] = static_cast<uint8_t>(values[i]);
  }
  return tensor;
}

std::vector<float> RowValues(const PackedWeight& weight) {
  Tensor out = *Tensor::Host(DType::kF32, {weight.out_features, weight.in_features});
  const absl::Status status = DequantizeWithReference(weight, &out);
  EXPECT_TRUE(status.ok()) << status;
  return {out.as<float>(), out.as<float>() + out.elements()};
}

TEST(Float8, TypesHaveTheirPublishedValues) {
  const auto e4m3 = [](int bits) {
    return Float8ToF32(DType::kF8E4M3, static_cast<uint8_t>(bits));
  };
  const auto e5m2 = [](int bits) {
    return Float8ToF32(DType::kF8E5M2, static_cast<uint8_t>(bits));
  };
  EXPECT_EQ(e4m3(0x7E), 448);
  EXPECT_EQ(e4m3(0x08), 0x1p-6f);
  EXPECT_EQ(e4m3(0x01), 0x1p-9f);
  EXPECT_EQ(e4m3(0x38), 1);
  EXPECT_EQ(e4m3(0xB9), -1.125f);
  EXPECT_TRUE(std::isnan(e4m3(0x7F)) && std::isnan(e4m3(0xFF)));
  EXPECT_EQ(e5m2(0x7B), 57344);
  EXPECT_EQ(e5m2(0x04), 0x1p-14f);
  EXPECT_EQ(e5m2(0x01), 0x1p-16f);
  EXPECT_EQ(e5m2(0x3C), 1);
  EXPECT_TRUE(std::isinf(e5m2(0x7C)) && std::isnan(e5m2(0x7D)));
}

TEST(Float8, RoundsToNearestEvenAndSaturates) {
  const auto e4m3 = [](float x) { return static_cast<int>(F32ToFloat8(DType::kF8E4M3, x)); };
  EXPECT_EQ(e4m3(1.0625f), 0x38);    // between 1 and 1.125: the even code
  EXPECT_EQ(e4m3(1.1875f), 0x3A);    // between 1.125 and 1.25
  EXPECT_EQ(e4m3(-0x1p-10f), 0x80);  // half the least value: to zero, with its sign
  EXPECT_EQ(e4m3(0x1.8p-9f), 0x02);
  EXPECT_EQ(e4m3(464), 0x7E);
  EXPECT_EQ(e4m3(1e30f), 0x7E);
  EXPECT_EQ(e4m3(-std::numeric_limits<float>::infinity()), 0xFE);
  EXPECT_EQ(e4m3(std::nanf("")) & 0x7F, 0x7F);
  EXPECT_EQ(static_cast<int>(F32ToFloat8(DType::kF8E5M2, 1e30f)), 0x7B);
}

TEST(Int8Row, IsScaleTimesCode) {
  const auto weight = MakeInt8Row({}, Bytes(DType::kI8, {2, 3}, {127, 0x80, 0, 1, 0xFF, 2}),
                                  Tensor::FromF32({2}, {0.5f, 2.0f}));
  ASSERT_TRUE(weight.ok()) << weight.status();
  EXPECT_EQ(weight->format_json, "{}");
  EXPECT_THAT(RowValues(*weight), ElementsAre(63.5f, -64, 0, 2, -2, 4));
  EXPECT_EQ(weight->BitsPerWeight(), (6 * 8 + 64) / 6.0);
}

TEST(Float8, IsScaleTimesValue) {
  const Tensor codes = Bytes(DType::kF8E4M3, {2, 2}, {0x7E, 0x38, 0xB8, 0x01});
  const auto rows = MakeFloat8({}, codes, Tensor::FromF32({2}, {0.5f, 2.0f}));
  ASSERT_TRUE(rows.ok()) << rows.status();
  EXPECT_EQ(rows->format_json, R"({"dtype":"e4m3","scale":"channel"})");
  EXPECT_THAT(RowValues(*rows), ElementsAre(224, 0.5f, -2, 0x1p-8f));
  const auto whole = MakeFloat8({DType::kF8E4M3, true, true}, codes, Tensor::FromF32({1}, {4}));
  ASSERT_TRUE(whole.ok()) << whole.status();
  EXPECT_EQ(whole->format_json, R"({"activations":"fp8","dtype":"e4m3","scale":"tensor"})");
  EXPECT_THAT(RowValues(*whole), ElementsAre(1792, 4, -4, 0x1p-7f));
}

TEST(Row8, ChecksRefuseWhatIsNotInTheFormat) {
  const Tensor scale = Tensor::FromF32({2}, {0.5f, 2.0f});
  const auto status = [](const absl::StatusOr<PackedWeight>& weight) {
    return std::string(weight.status().message());
  };
  const Tensor codes = Bytes(DType::kI8, {2, 2}, {1, 2, 3, 4});
  EXPECT_THAT(status(MakeInt8Row({}, codes, Tensor::FromF32({1}, {1}))), HasSubstr("shape"));
  EXPECT_THAT(status(MakeInt8Row({}, codes, Tensor::FromF32({2}, {1, 0}))), HasSubstr("positive"));
  EXPECT_THAT(status(MakeInt8Row({}, codes, Tensor::FromI32({2}, {1, 1}))), HasSubstr("dtype"));
  EXPECT_THAT(status(MakeInt8Row({}, Bytes(DType::kU8, {2, 2}, {1, 2, 3, 4}), scale)),
              HasSubstr("dtype"));
  EXPECT_THAT(status(MakeFloat8({}, Bytes(DType::kF8E4M3, {2, 2}, {0, 0, 0x7F, 0}), scale)),
              HasSubstr("row 1, column 0"));
  EXPECT_THAT(
      status(MakeFloat8({DType::kF8E5M2}, Bytes(DType::kF8E5M2, {2, 2}, {0, 0xFC, 0, 0}), scale)),
      HasSubstr("row 0, column 1"));
  EXPECT_FALSE(ParseInt8RowJson(R"({"activations":"fp8"})").ok());
  EXPECT_FALSE(ParseFloat8Json(R"({"scale":"channel","dtype":"e4m3"})").ok());
  EXPECT_FALSE(ParseFloat8Json(R"({"activations":"fp8","dtype":"e5m2","scale":"tensor"})").ok());
}

TEST(Activations, AreRoundedPerRow) {
  const Tensor x = Tensor::FromF32({2, 3}, {127.5f, 1.5f, -127.5f, 0, 0, 0});
  Tensor out = *Tensor::Host(DType::kF32, {2, 3});
  ASSERT_TRUE(QuantizeActivationsReference(Activations::kInt8, x, &out).ok());
  const std::vector<float> rounded(out.as<float>(), out.as<float>() + 6);
  EXPECT_THAT(rounded, ElementsAre(127, 2, -128, 0, 0, 0));  // 127.5 is beyond the largest code
  const Tensor y = Tensor::FromF32({1, 3}, {448, 17, std::nanf("")});
  Tensor nan = *Tensor::Host(DType::kF32, {1, 3});
  ASSERT_TRUE(QuantizeActivationsReference(Activations::kFp8, y, &nan).ok());
  EXPECT_TRUE(std::isnan(nan.as<float>()[0]));
  const Tensor z = Tensor::FromF32({1, 2}, {448, 17});
  Tensor fp8 = *Tensor::Host(DType::kF32, {1, 2});
  ASSERT_TRUE(QuantizeActivationsReference(Activations::kFp8, z, &fp8).ok());
  EXPECT_EQ(fp8.as<float>()[0], 448);
  EXPECT_EQ(fp8.as<float>()[1], 16);
}

TEST(Activations, AreToldByTheParameters) {
  EXPECT_EQ(ActivationsOf("{}"), Activations::kFloat);
  EXPECT_EQ(ActivationsOf(Int8RowJson({true})), Activations::kInt8);
  EXPECT_EQ(ActivationsOf(Float8Json({DType::kF8E4M3, false, true})), Activations::kFp8);
  EXPECT_EQ(ActivationsOf(Float8Json({})), Activations::kFloat);
}

}  // namespace
}  // namespace quantmill
