// ptq with 8-bit floats and with quantized activations.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "quantmill/quantize_linear.h"
#include "quantmill/sdk/float8.hpp"
#include "quantmill/testing/fake_call.hpp"

extern "C" const qm_plugin* qm_plugin_entry_v1(void);

namespace {

using qm::testing::FakeCall;
using Options = std::vector<std::pair<std::string, std::string>>;

const qm_method& Row8Method() { return *qm_plugin_entry_v1()->methods[0]; }
const qm_quantize_linear& Row8Table() {
  return *static_cast<const qm_quantize_linear*>(
      Row8Method().ext(&Row8Method(), QM_EXT_QUANTIZE_LINEAR));
}

qm_linear_info Row8Info(int64_t rows, int64_t columns) {
  qm_linear_info info = {};
  info.struct_size = sizeof info;
  info.name = "model.layers.0.mlp.up_proj";
  info.role = "mlp.up";
  info.out_features = rows;
  info.in_features = columns;
  info.weight_dtype = QM_BF16;
  info.scale_dtype = QM_F32;
  return info;
}

void Apply(const Options& options, FakeCall* call) {
  call->Defaults(Row8Method());
  for (const auto& [name, value] : options) call->Set(name, value);
}

struct Result {
  std::string id, json;
  std::vector<uint8_t> codes;
  std::vector<float> scale;
};

Result Quantize(const Options& options, int64_t rows, int64_t columns, const std::vector<float>& w,
                qm_device device = {QM_CPU, 0}) {
  FakeCall call(device);
  Apply(options, &call);
  const qm_linear_info info = Row8Info(rows, columns);
  const qm_tensor weight = call.Tensor(w, {rows, columns});
  qm_packed packed = {};
  EXPECT_EQ(Row8Table().run(call.get(), &info, &weight, nullptr, &packed), QM_OK) << call.error();
  if (packed.tensor_count != 2) return {};
  qm_tensor codes = packed.tensors[0].tensor;
  codes.dtype = QM_U8;  // bytes, whatever they stand for
  return {packed.format_id, packed.format_json, call.Read<uint8_t>(codes),
          call.Read<float>(packed.tensors[1].tensor)};
}

std::vector<float> Weights(int64_t count) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0, 0.03f);
  std::vector<float> w(static_cast<size_t>(count));
  for (float& x : w) x = normal(random);
  return w;
}

std::string Refusal(const Options& options) {
  FakeCall call;
  Apply(options, &call);
  const qm_linear_info info = Row8Info(64, 256);
  qm_quant_plan plan = {};
  plan.struct_size = sizeof plan;
  EXPECT_EQ(Row8Table().plan(call.get(), &info, &plan), QM_INVALID_ARGUMENT);
  return call.error();
}

void ExpectIn(const std::string& part, const std::string& text) {
  EXPECT_NE(text.find(part), std::string::npos) << text;
}

constexpr int64_t kHardRows = 6, kHardColumns = 101;

std::vector<float> HardWeights() {
  std::vector<float> w = Weights(kHardRows * kHardColumns);
  for (int64_t c = 0; c < kHardColumns; ++c) w[1 * kHardColumns + c] = 0.0f;
  for (int64_t c = 0; c < kHardColumns; ++c) w[2 * kHardColumns + c] = 0.5f;
  w[3 * kHardColumns + 50] = 80.0f;
  return w;
}

TEST(PtqFp8, HasAScalePerChannelOrForAll) {
  const std::vector<float> w = HardWeights();
  for (const auto& [dtype, name, largest] :
       {std::tuple{"fp8_e4m3", "e4m3", 448.0f}, std::tuple{"fp8_e5m2", "e5m2", 57344.0f}}) {
    const Result rows =
        Quantize({{"dtype", dtype}, {"group_size", "-1"}}, kHardRows, kHardColumns, w);
    EXPECT_EQ(rows.id, "qm.fmt.float8/1");
    EXPECT_EQ(rows.json, qm::StrCat("{\"dtype\":\"", name, "\",\"scale\":\"channel\"}"));
    // The default group size, which is for integers, is a channel here.
    EXPECT_EQ(Quantize({{"dtype", dtype}}, kHardRows, kHardColumns, w).codes, rows.codes);
    const Result whole =
        Quantize({{"dtype", dtype}, {"group_size", "0"}}, kHardRows, kHardColumns, w);
    EXPECT_EQ(whole.json, qm::StrCat("{\"dtype\":\"", name, "\",\"scale\":\"tensor\"}"));
    EXPECT_EQ(whole.scale, std::vector<float>{80.0f / largest});
    for (int64_t r = 0; r < kHardRows; ++r) {
      float most = 0;
      for (int64_t c = 0; c < kHardColumns; ++c)
        most = std::max(most, std::fabs(w[r * kHardColumns + c]));
      EXPECT_EQ(rows.scale[r], (most == 0 ? 1.0f : most) / largest);
      for (int64_t c = 0; c < kHardColumns; ++c) {
        // `is_e4m3`: clang 14 does not let a lambda refer to a structured binding.
        const auto code = [&, is_e4m3 = largest == 448.0f](float scale) {
          const float q = w[r * kHardColumns + c] / scale;
          return is_e4m3 ? qm::ToE4M3(q) : qm::ToE5M2(q);
        };
        ASSERT_EQ(rows.codes[r * kHardColumns + c], code(rows.scale[r]));
        ASSERT_EQ(whole.codes[r * kHardColumns + c], code(whole.scale[0]));
      }
    }
  }
}

TEST(PtqInt8Activations, HaveTheValuesOfAffineIntegers) {
  const std::vector<float> w = HardWeights();
  for (const char* variant : {"rtn", "mse"}) {
    const Result result = Quantize({{"bits", "8"},
                                    {"group_size", "-1"},
                                    {"symmetric", "true"},
                                    {"variant", variant},
                                    {"activations", "int8"}},
                                   kHardRows, kHardColumns, w);
    EXPECT_EQ(result.id, "qm.fmt.int8-row/1");
    EXPECT_EQ(result.json, R"({"activations":"int8"})");
    if (std::string(variant) == "rtn") {
      EXPECT_EQ(result.scale[2], 0.5f / 127.5f);
    }
    for (int64_t r = 0; r < kHardRows; ++r) {
      for (int64_t c = 0; c < kHardColumns; ++c) {
        const float q = w[r * kHardColumns + c] / result.scale[r];
        ASSERT_EQ(static_cast<int8_t>(result.codes[r * kHardColumns + c]),
                  std::clamp(std::nearbyint(q), -128.0f, 127.0f))
            << r << ", " << c;
      }
    }
  }
}

TEST(PtqRow8, RefusesWhatDoesNotGoTogether) {
  ExpectIn("bits 8, group_size -1", Refusal({{"activations", "int8"}}));
  ExpectIn("symmetric true",
           Refusal({{"activations", "int8"}, {"bits", "8"}, {"group_size", "-1"}}));
  ExpectIn("fp8_e4m3", Refusal({{"activations", "fp8"}, {"bits", "8"}}));
  ExpectIn("none, int8 or fp8", Refusal({{"activations", "int4"}}));
  ExpectIn("fp8_e4m3", Refusal({{"dtype", "fp8"}}));
  ExpectIn("-1", Refusal({{"dtype", "fp8_e4m3"}, {"group_size", "64"}}));
  ExpectIn("rtn", Refusal({{"dtype", "fp8_e4m3"}, {"variant", "mse"}}));
  ExpectIn("fp8", Refusal({{"dtype", "fp8_e4m3"}, {"activations", "int8"}}));
  ExpectIn("fp8_e4m3", Refusal({{"dtype", "fp8_e5m2"}, {"activations", "fp8"}}));
}

TEST(PtqRow8, PlansSayFormatAndSize) {
  FakeCall call;
  Apply({{"dtype", "fp8_e4m3"}, {"group_size", "0"}, {"activations", "fp8"}}, &call);
  const qm_linear_info info = Row8Info(64, 256);
  qm_quant_plan plan = {};
  plan.struct_size = sizeof plan;
  ASSERT_EQ(Row8Table().plan(call.get(), &info, &plan), QM_OK) << call.error();
  EXPECT_STREQ(plan.format_json, R"({"activations":"fp8","dtype":"e4m3","scale":"tensor"})");
  EXPECT_EQ(plan.bits_per_weight, 8.0 + 32.0 / (64 * 256));
}

TEST(PtqRow8, NamesTheFirstWeightThatIsNotFinite) {
  for (const Options& options :
       {Options{{"dtype", "fp8_e5m2"}},
        Options{
            {"bits", "8"}, {"group_size", "-1"}, {"symmetric", "true"}, {"activations", "int8"}}}) {
    std::vector<float> w = Weights(20 * 8);
    w[7 * 8 + 3] = std::nanf("");
    FakeCall call;
    Apply(options, &call);
    const qm_linear_info info = Row8Info(20, 8);
    const qm_tensor weight = call.Tensor(w, {20, 8});
    qm_packed packed = {};
    EXPECT_EQ(Row8Table().run(call.get(), &info, &weight, nullptr, &packed), QM_INVALID_ARGUMENT);
    ExpectIn("row 7, column 3", call.error());
  }
}

#if defined(QM_HAVE_CUDA)
TEST(PtqRow8Cuda, CodesAndScalesEqualTheCpuBitForBit) {
  if (!qm::testing::HaveGpu()) GTEST_SKIP() << "no GPU";
  const std::vector<float> w = HardWeights();
  for (const Options& options :
       {Options{{"dtype", "fp8_e5m2"}}, Options{{"dtype", "fp8_e4m3"}, {"group_size", "0"}},
        Options{
            {"bits", "8"}, {"group_size", "-1"}, {"symmetric", "true"}, {"activations", "int8"}}}) {
    const Result cpu = Quantize(options, kHardRows, kHardColumns, w);
    const Result cuda = Quantize(options, kHardRows, kHardColumns, w, {QM_CUDA, 0});
    EXPECT_EQ(cpu.codes, cuda.codes);
    EXPECT_EQ(cpu.scale, cuda.scale);
    EXPECT_EQ(cpu.json, cuda.json);
  }
}
#endif

}  // namespace
