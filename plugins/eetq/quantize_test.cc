// eetq's rounding against the rules written out slowly, and bad input.
#include "quantize.h"

#include <algorithm>
#include <limits>
#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "row8_test_util.h"

namespace eetq_testing {
namespace {

using qm::testing::FakeCall;
using ::testing::HasSubstr;

const qm_quantize_linear& Table() {
  return *static_cast<const qm_quantize_linear*>(Method(0)->ext(Method(0), QM_EXT_QUANTIZE_LINEAR));
}

qm_linear_info Info(int64_t rows, int64_t columns, qm_dtype scale_dtype = QM_F16) {
  qm_linear_info info = {};
  info.struct_size = sizeof info;
  info.name = "model.layers.0.mlp.up_proj";
  info.role = "mlp.up";
  info.out_features = rows;
  info.in_features = columns;
  info.weight_dtype = QM_BF16;
  info.scale_dtype = scale_dtype;
  return info;
}

struct Result {
  std::string json;
  std::vector<uint8_t> codes;
  std::vector<float> scale;
};

std::vector<float> Floats(FakeCall& call, const qm_tensor& t) {
  std::vector<float> values;
  if (t.dtype == QM_F32) return call.Read<float>(t);
  if (t.dtype == QM_F16) {
    for (const qm::F16 x : call.Read<qm::F16>(t)) values.push_back(qm::ToFloat(x));
  } else {
    for (const qm::BF16 x : call.Read<qm::BF16>(t)) values.push_back(qm::ToFloat(x));
  }
  return values;
}

Result Quantize(const std::string& dtype, const qm_linear_info& info, const std::vector<float>& w,
                qm_device device = {QM_CPU, 0}, int threads = 2) {
  FakeCall call(device);
  call.Defaults(*Method(0)).Set("dtype", dtype).Threads(threads);
  const qm_tensor weight = call.Tensor(w, {info.out_features, info.in_features});
  qm_packed packed = {};
  EXPECT_EQ(Table().run(call.get(), &info, &weight, nullptr, &packed), QM_OK) << call.error();
  if (packed.tensor_count != 2) return {};
  qm_tensor codes = packed.tensors[0].tensor;
  codes.dtype = QM_U8;  // bytes, whatever they stand for
  return {packed.format_json, call.Read<uint8_t>(codes), Floats(call, packed.tensors[1].tensor)};
}

constexpr int64_t kRows = 9, kColumns = 320;

std::vector<float> HardWeights() {
  std::vector<float> w = RandomVector(kRows * kColumns, 3);
  for (float& x : w) x *= 0.02f;
  for (int64_t c = 0; c < kColumns; ++c) {
    w[1 * kColumns + c] = 0.0f;
    w[2 * kColumns + c] = 0.25f;
    w[3 * kColumns + c] = -0.25f;
    w[4 * kColumns + c] *= 1e-6f;   // scales below the least normal F16
    w[5 * kColumns + c] *= 1e-12f;  // below the least F16
    w[6 * kColumns + c] *= 1e9f;    // beyond the largest
    // Halves: w / s is a whole number and a half when the largest is 128 steps of a power of two.
    w[7 * kColumns + c] = (static_cast<float>(c % 255) - 127.0f + 0.5f) * 0x1p-10f;
  }
  w[7 * kColumns] = -128.0f * 0x1p-10f;
  w[8 * kColumns + 7] = 50.0f;  // an outlier
  return w;
}

// The rule in f64: exact quotients decide; the published code divides in f32, which differs where a
// quotient is within a rounding of a half, so codes next to one are let be.
void ExpectInt8Rule(const std::vector<float>& w, const Result& result, qm_dtype scale_dtype) {
  for (int64_t r = 0; r < kRows; ++r) {
    const float* row = w.data() + r * kColumns;
    float largest = 0;
    for (int64_t c = 0; c < kColumns; ++c) largest = std::max(largest, std::abs(row[c]));
    const float scale = largest == 0 ? 1.0f / 128 : largest / 128;
    float stored = scale;
    if (scale_dtype == QM_F16) {
      stored = qm::ToFloat(qm::ToF16(scale));
      if (stored == 0) stored = 0x1p-24f;
      if (!std::isfinite(stored)) stored = 65504;
    }
    EXPECT_EQ(result.scale[r], stored) << "row " << r;
    const bool normal = scale_dtype != QM_F16 || (scale >= 0x1p-14f && scale <= 65504);
    const double divisor = normal ? scale : stored;
    for (int64_t c = 0; c < kColumns; ++c) {
      const double quotient = row[c] / divisor;
      const double rounded =
          std::clamp(std::round(quotient), -128.0, 127.0);  // half away from zero
      const int code = static_cast<int8_t>(result.codes[r * kColumns + c]);
      const double to_half = std::abs(std::abs(quotient) - std::floor(std::abs(quotient)) - 0.5);
      if (to_half > 0 && to_half < 1e-4) {
        EXPECT_NEAR(code, rounded, 1) << r << ", " << c;
      } else {
        ASSERT_EQ(code, rounded) << r << ", " << c << ": " << row[c] << " / " << divisor;
      }
    }
  }
}

TEST(Int8, FollowsThePublishedRule) {
  const std::vector<float> w = HardWeights();
  for (const qm_dtype dtype : {QM_F16, QM_F32}) {
    const Result result = Quantize("int8", Info(kRows, kColumns, dtype), w);
    EXPECT_EQ(result.json, "{}");
    ExpectInt8Rule(w, result, dtype);
  }
}

TEST(Int8, SaturatesTheLargestPositiveWeightAndRoundsHalvesAway) {
  const Result result =
      Quantize("int8", Info(1, 6), {1.0f, -1.0f, 0.5f / 128, -0.5f / 128, 1.5f / 128, 0.0f});
  const std::vector<int> expected = {127, -128, 1, -1, 2, 0};
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(static_cast<int8_t>(result.codes[i]), expected[i]) << i;
  }
  EXPECT_EQ(result.scale, std::vector<float>{0x1p-7f});
}

TEST(Fp8, FollowsTheRuleOfTheReferenceTypes) {
  const std::vector<float> w = HardWeights();
  const Result result = Quantize("fp8_e4m3", Info(kRows, kColumns, QM_F32), w);
  EXPECT_EQ(result.json, R"({"dtype":"e4m3","scale":"channel"})");
  for (int64_t r = 0; r < kRows; ++r) {
    const float* row = w.data() + r * kColumns;
    float largest = 0;
    for (int64_t c = 0; c < kColumns; ++c) largest = std::max(largest, std::abs(row[c]));
    const float scale = (largest == 0 ? 1.0f : largest) / 448;
    EXPECT_EQ(result.scale[r], scale);
    for (int64_t c = 0; c < kColumns; ++c) {
      ASSERT_EQ(result.codes[r * kColumns + c],
                quantmill::F32ToFloat8(DType::kF8E4M3, row[c] / scale))
          << r << ", " << c;
    }
  }
}

// All 65536 upper halves of floats and their neighbours, ties among them.
TEST(Fp8, ConversionsEqualTheReference) {
  for (uint32_t high = 0; high < 0x10000; ++high) {
    for (const uint32_t low : {0u, 1u, 0x8000u, 0xFFFFu}) {
      const float value = qm::FloatFromBits(high << 16 | low);
      // The reference counts codes up; only a slice of the range is worth its time.
      if (low != 0 && high % 8 != 0) continue;
      ASSERT_EQ(qm::ToE4M3(value), quantmill::F32ToFloat8(DType::kF8E4M3, value)) << value;
      ASSERT_EQ(qm::ToE5M2(value), quantmill::F32ToFloat8(DType::kF8E5M2, value)) << value;
    }
  }
  for (int code = 0; code < 256; ++code) {
    const uint8_t byte = static_cast<uint8_t>(code);
    if ((code & 0x7F) <= 0x7E) {
      EXPECT_EQ(qm::FromE4M3(byte), quantmill::Float8ToF32(DType::kF8E4M3, byte)) << code;
      EXPECT_EQ(qm::ToE4M3(qm::FromE4M3(byte)), byte);
    }
    if ((code & 0x7F) <= 0x7B) {
      EXPECT_EQ(qm::FromE5M2(byte), quantmill::Float8ToF32(DType::kF8E5M2, byte)) << code;
      EXPECT_EQ(qm::ToE5M2(qm::FromE5M2(byte)), byte);
    }
  }
}

TEST(Both, GiveTheSameBytesForAnyNumberOfThreads) {
  const std::vector<float> w = HardWeights();
  for (const char* dtype : {"int8", "fp8_e4m3"}) {
    const Result one = Quantize(dtype, Info(kRows, kColumns), w, {QM_CPU, 0}, 0);
    const Result three = Quantize(dtype, Info(kRows, kColumns), w, {QM_CPU, 0}, 3);
    EXPECT_EQ(one.codes, three.codes);
    EXPECT_EQ(one.scale, three.scale);
  }
}

TEST(Both, NameTheFirstWeightThatIsNotFinite) {
  for (const char* dtype : {"int8", "fp8_e4m3"}) {
    std::vector<float> w = RandomVector(40 * 8);
    w[17 * 8 + 3] = std::nanf("");
    w[39 * 8 + 1] = INFINITY;
    FakeCall call;
    call.Defaults(*Method(0)).Set("dtype", dtype).Threads(3);
    const qm_linear_info info = Info(40, 8);
    const qm_tensor weight = call.Tensor(w, {40, 8});
    qm_packed packed = {};
    EXPECT_EQ(Table().run(call.get(), &info, &weight, nullptr, &packed), QM_INVALID_ARGUMENT);
    EXPECT_THAT(call.error(), HasSubstr("row 17, column 3"));
  }
}

TEST(Both, PlanSaysFormatAndSize) {
  for (const auto& [dtype, id] :
       {std::pair{"int8", "qm.fmt.int8-row/1"}, std::pair{"fp8_e4m3", "qm.fmt.float8/1"}}) {
    FakeCall call;
    call.Defaults(*Method(0)).Set("dtype", dtype);
    const qm_linear_info info = Info(64, 128);
    qm_quant_plan plan = {};
    plan.struct_size = sizeof plan;
    ASSERT_EQ(Table().plan(call.get(), &info, &plan), QM_OK) << call.error();
    EXPECT_STREQ(plan.format_id, id);
    EXPECT_EQ(plan.bits_per_weight, 8.0 + 16.0 / 128);
    EXPECT_EQ(plan.stat_count, 0u);
  }
}

TEST(Both, RefuseWhatIsNotOffered) {
  FakeCall call;
  call.Defaults(*Method(0)).Set("dtype", "int4");
  qm_linear_info info = Info(64, 128);
  qm_quant_plan plan = {};
  plan.struct_size = sizeof plan;
  EXPECT_EQ(Table().plan(call.get(), &info, &plan), QM_INVALID_ARGUMENT);
  EXPECT_THAT(call.error(), HasSubstr("int8 or fp8_e4m3"));
  FakeCall empty;
  empty.Defaults(*Method(0));
  info.out_features = 0;
  EXPECT_EQ(Table().plan(empty.get(), &info, &plan), QM_INVALID_ARGUMENT);
}

#if defined(QM_HAVE_CUDA)
TEST(QuantizeCuda, CodesAndScalesEqualTheCpuBitForBit) {
  if (!qm::testing::HaveGpu()) GTEST_SKIP() << "no GPU";
  const std::vector<float> w = HardWeights();
  const std::vector<float> wide = RandomVector(3 * 5000);
  for (const char* dtype : {"int8", "fp8_e4m3"}) {
    for (const qm_dtype scale : {QM_F16, QM_BF16, QM_F32}) {
      for (const auto& [rows, columns, weights] :
           {std::tuple{kRows, kColumns, &w}, std::tuple{int64_t{1}, kColumns, &w},
            std::tuple{int64_t{3}, int64_t{5000}, &wide}}) {
        const std::vector<float> part(weights->begin(), weights->begin() + rows * columns);
        const Result cpu = Quantize(dtype, Info(rows, columns, scale), part);
        const Result cuda = Quantize(dtype, Info(rows, columns, scale), part, {QM_CUDA, 0});
        EXPECT_EQ(cpu.codes, cuda.codes) << dtype;
        EXPECT_EQ(cpu.scale, cuda.scale) << dtype;
      }
    }
  }
}

TEST(QuantizeCuda, NamesTheFirstWeightThatIsNotFinite) {
  if (!qm::testing::HaveGpu()) GTEST_SKIP() << "no GPU";
  for (const char* dtype : {"int8", "fp8_e4m3"}) {
    std::vector<float> w = RandomVector(40 * 8);
    w[17 * 8 + 3] = std::nanf("");
    w[39 * 8 + 1] = INFINITY;
    FakeCall call({QM_CUDA, 0});
    call.Defaults(*Method(0)).Set("dtype", dtype);
    const qm_linear_info info = Info(40, 8);
    const qm_tensor weight = call.Tensor(w, {40, 8});
    qm_packed packed = {};
    EXPECT_EQ(Table().run(call.get(), &info, &weight, nullptr, &packed), QM_INVALID_ARGUMENT);
    EXPECT_THAT(call.error(), HasSubstr("row 17, column 3"));
  }
}
#endif

}  // namespace
}  // namespace eetq_testing
