// The stage against bitsandbytes (nf4_vectors.h), against the definition written out slowly, and
// what it does with odd and bad input.
#include "nf4.h"

#include <cmath>
#include <limits>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nf4_math.h"
#include "nf4_test_util.h"
#include "nf4_vectors.h"

namespace nf4_testing {
namespace {

using ::testing::HasSubstr;

std::vector<uint8_t> FromHex(const std::string& text) {
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i < text.size(); i += 2) {
    bytes.push_back(static_cast<uint8_t>(std::stoi(text.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

// fp4 has two codes for 0; which of them a tiny weight gets is not the same on every backend of the
// peer.
int OneZero(int code, bool fp4) { return fp4 && code == 8 ? 0 : code; }

std::vector<int> Unpack(const std::vector<uint8_t>& bytes, int64_t count, bool fp4) {
  std::vector<int> codes;
  for (int64_t i = 0; i < count; ++i) {
    codes.push_back(OneZero(i % 2 == 0 ? bytes[i / 2] >> 4 : bytes[i / 2] & 15, fp4));
  }
  return codes;
}

TEST(Nf4, ChoosesTheCodesOfBitsandbytes) {
  constexpr int64_t kCount = nf4_vectors::kRows * nf4_vectors::kColumns;
  for (const nf4_vectors::Vector& want : nf4_vectors::kVectors) {
    SCOPED_TRACE(testing::Message() << (want.fp4 ? "fp4 " : "nf4 ") << want.block_size);
    FakeCall call;
    Apply({want.fp4, want.block_size, false}, &call);
    qm_packed packed = {};
    ASSERT_EQ(Quantize(call, Info(nf4_vectors::kRows, nf4_vectors::kColumns),
                       nf4_vectors::OracleWeights(), &packed),
              QM_OK)
        << call.error();
    EXPECT_EQ(Unpack(call.Read<uint8_t>(0, "codes"), kCount, want.fp4),
              Unpack(FromHex(want.codes), kCount, want.fp4));
    if (want.block_size != 64) continue;
    const std::vector<float> absmax = call.Read<float>(0, "absmax");
    EXPECT_EQ(absmax, std::vector<float>(std::begin(nf4_vectors::kAbsmax64),
                                         std::end(nf4_vectors::kAbsmax64)));
  }
}

TEST(Nf4, QuantizesFactorsAsBitsandbytes) {
  FakeCall call;
  Apply({false, 32, true}, &call);
  qm_packed packed = {};
  ASSERT_EQ(Quantize(call, Info(nf4_vectors::kRows, nf4_vectors::kColumns),
                     nf4_vectors::OracleWeights(), &packed),
            QM_OK)
      << call.error();
  EXPECT_EQ(call.Read<uint8_t>(0, "absmax"), FromHex(nf4_vectors::kNestedBytes));
  // The mean of 15 factors: two orders of summation in f32.
  EXPECT_NEAR(call.Read<float>(0, "absmax_offset")[0], nf4_vectors::kAbsmaxOffset, 15 * 0x1p-25);
  EXPECT_NEAR(call.Read<float>(0, "nested_absmax")[0], nf4_vectors::kNestedAbsmax, 15 * 0x1p-25);
  uint64_t hash = 1469598103934665603u;
  for (const float value : call.Read<float>(0, "nested_codebook")) {
    uint8_t bytes[4];
    std::memcpy(bytes, &value, 4);
    for (const uint8_t byte : bytes) hash = (hash ^ byte) * 1099511628211u;
  }
  EXPECT_EQ(hash, nf4_vectors::kByteCodebookHash);
}

TEST(Nf4, CodesAreTheNearestValues) {
  for (const bool fp4 : {false, true}) {
    const float* codebook = quantmill::nf4::CodebookOf(fp4);
    for (int step = -4000; step <= 4000; ++step) {
      const float x = static_cast<float>(step) / 4000.0f;
      const uint32_t code = quantmill::nf4::Encode(x, fp4);
      ASSERT_LT(code, 16u);
      for (int other = 0; other < 16; ++other) {
        // Midpoints are rounded to f32.
        ASSERT_LE(std::fabs(x - codebook[code]), std::fabs(x - codebook[other]) + 0x1p-23) << x;
      }
    }
  }
  EXPECT_EQ(quantmill::nf4::Encode(0.0f, false), 7u);
  EXPECT_EQ(quantmill::nf4::Encode(0.0f, true), 0u);
}

TEST(Nf4, EveryWeightIsTheNearestOfItsBlock) {
  for (const ShapeCase& shape : kShapes) {
    for (const Setting& setting : Settings()) {
      if (setting.double_quant) continue;
      SCOPED_TRACE(testing::Message() << shape.rows << "x" << shape.columns << " block "
                                      << setting.block_size << (setting.fp4 ? " fp4" : " nf4"));
      const int64_t n = shape.rows * shape.columns;
      const std::vector<float> w = Gaussian(n, 1);
      const PackedWeight packed = RandomWeight(shape.rows, shape.columns, setting);
      ASSERT_TRUE(quantmill::CheckCodebookAbsmax(packed).ok())
          << quantmill::CheckCodebookAbsmax(packed);
      const std::vector<float> seen = ReferenceWeight(packed);
      const float* codebook = packed.Find("codebook")->as<float>();
      for (int64_t begin = 0; begin < n; begin += setting.block_size) {
        const int64_t end = std::min<int64_t>(n, begin + setting.block_size);
        float absmax = 0;
        for (int64_t i = begin; i < end; ++i) absmax = std::max(absmax, std::fabs(w[i]));
        for (int64_t i = begin; i < end; ++i) {
          double best = INFINITY;
          for (int c = 0; c < 16; ++c) {
            best = std::min(best, std::fabs(static_cast<double>(codebook[c]) * absmax - w[i]));
          }
          // x and the midpoint are rounded to f32 each.
          ASSERT_LE(std::fabs(static_cast<double>(seen[i]) - w[i]), best + absmax * 0x1p-21) << i;
        }
      }
    }
  }
}

TEST(Nf4, DoubleQuantizationKeepsTheCodesAndMostOfTheFactors) {
  const int64_t rows = 512, columns = 1024;  // 8192 factors, 32 ranges
  const std::vector<float> plain = ReferenceWeight(RandomWeight(rows, columns, {false, 64, false}));
  const PackedWeight nested = RandomWeight(rows, columns, {false, 64, true});
  ASSERT_TRUE(quantmill::CheckCodebookAbsmax(nested).ok());
  const std::vector<float> seen = ReferenceWeight(nested);
  double error = 0, power = 0;
  for (size_t i = 0; i < plain.size(); ++i) {
    error += std::pow(static_cast<double>(seen[i]) - plain[i], 2);
    power += std::pow(static_cast<double>(plain[i]), 2);
  }
  // Bytes are 1/128 of the range apart at most, and the range is a fraction of the mean.
  EXPECT_LT(error / power, 1e-4);
  EXPECT_NEAR(nested.BitsPerWeight(), 4 + 8.0 / 64 + 32.0 / (64 * 256), 0.02);
}

TEST(Nf4, ZeroBlocksGiveZero) {
  for (const Setting& setting : Settings()) {
    FakeCall call;
    Apply(setting, &call);
    qm_packed packed = {};
    ASSERT_EQ(Quantize(call, Info(8, 100), std::vector<float>(800), &packed), QM_OK)
        << call.error();
    for (const float value : ReferenceWeight(Keep(packed))) ASSERT_EQ(value, 0.0f);
  }
}

TEST(Nf4, TakesTinyAndHugeWeights) {
  std::vector<float> w(256);
  for (int i = 0; i < 64; ++i) w[i] = 1e-42f * static_cast<float>(i);         // subnormal
  for (int i = 64; i < 128; ++i) w[i] = 3e38f * (i % 2 == 0 ? 1.0f : -1.0f);  // near the end of f32
  w[200] = 1e6f;                                                              // an outlier
  FakeCall call;
  Apply({}, &call);
  qm_packed packed = {};
  ASSERT_EQ(Quantize(call, Info(4, 64), w, &packed), QM_OK) << call.error();
  const std::vector<float> seen = ReferenceWeight(Keep(packed));
  for (int i = 64; i < 128; ++i) ASSERT_EQ(seen[i], w[i]);
  for (int i = 0; i < 64; ++i) ASSERT_LE(std::fabs(seen[i]), 1e-40f);
  EXPECT_EQ(seen[200], 1e6f);
  EXPECT_EQ(seen[201], 0.0f);
}

TEST(Nf4, RefusesWhatIsNotFinite) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(),
                          std::numeric_limits<float>::infinity(), -INFINITY}) {
    std::vector<float> w = Gaussian(5 * 40, 3);
    w[3 * 40 + 7] = bad;
    FakeCall call;
    Apply({}, &call);
    qm_packed packed = {};
    EXPECT_EQ(Quantize(call, Info(5, 40), w, &packed), QM_INVALID_ARGUMENT);
    EXPECT_THAT(call.error(), HasSubstr("row 3, column 7"));
  }
}

TEST(Nf4, RowsApartGiveTheSameBytes) {
  const int64_t rows = 9, columns = 70, stride = 83;
  const std::vector<float> w = Gaussian(rows * columns, 4);
  std::vector<float> apart(rows * stride, NAN);
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(w.data() + r * columns, columns, apart.data() + r * stride);
  }
  FakeCall call, together;
  Apply({}, &call);
  Apply({}, &together);
  qm_packed a = {}, b = {};
  ASSERT_EQ(Quantize(together, Info(rows, columns), w, &a), QM_OK);
  qm_tensor weight = call.Tensor(apart, {rows, stride});
  weight.shape[1] = columns;
  const qm_linear_info info = Info(rows, columns);
  ASSERT_EQ(Quantizer().run(call.get(), &info, &weight, nullptr, &b), QM_OK) << call.error();
  EXPECT_EQ(call.Read<uint8_t>(0, "codes"), together.Read<uint8_t>(0, "codes"));
  EXPECT_EQ(call.Read<float>(0, "absmax"), together.Read<float>(0, "absmax"));
}

TEST(Nf4, PlanSaysFormatAndSize) {
  for (const Setting& setting : Settings()) {
    FakeCall call, run;
    Apply(setting, &call);
    Apply(setting, &run);
    const qm_linear_info info = Info(48, 100, QM_F16);
    qm_quant_plan plan = {};
    plan.struct_size = sizeof plan;
    ASSERT_EQ(Quantizer().plan(call.get(), &info, &plan), QM_OK) << call.error();
    qm_packed packed = {};
    run.ScratchLimit(plan.scratch_bytes);
    ASSERT_EQ(Quantize(run, info, Gaussian(4800, 5), &packed), QM_OK) << run.error();
    EXPECT_STREQ(plan.format_json, packed.format_json);
    EXPECT_THAT(packed.format_json, HasSubstr("\"dtype\":\"f16\""));
    EXPECT_DOUBLE_EQ(plan.bits_per_weight, Keep(packed).BitsPerWeight());
  }
}

TEST(Nf4, PlanRefusesBlocksThatFilesCannotHold) {
  for (const char* size : {"16", "48", "8192", "0", "-1"}) {
    FakeCall call;
    Apply({}, &call).Set("block_size", size);
    const qm_linear_info info = Info(4, 64);
    qm_quant_plan plan = {};
    plan.struct_size = sizeof plan;
    EXPECT_EQ(Quantizer().plan(call.get(), &info, &plan), QM_INVALID_ARGUMENT) << size;
    EXPECT_THAT(call.error(), HasSubstr("4096"));
  }
}

TEST(Nf4, StopsWhenAskedTo) {
  FakeCall call;
  Apply({}, &call).CancelAt(0);
  qm_packed packed = {};
  EXPECT_EQ(Quantize(call, Info(64, 64), Gaussian(4096, 6), &packed), QM_CANCELLED);
}

}  // namespace
}  // namespace nf4_testing
