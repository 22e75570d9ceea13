// ptq against the rounding rules written out slowly in f64 (with the published f32 divisions), and
// against byte vectors of FORMATS.md.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "quantmill/quantize_linear.h"
#include "quantmill/testing/affine_reading.hpp"
#include "quantmill/testing/fake_call.hpp"

extern "C" const qm_plugin* qm_plugin_entry_v1(void);

namespace {

using qm::testing::AffineContent;
using qm::testing::FakeCall;
using qm::testing::ReadAffine;

const qm_method& PtqMethod() { return *qm_plugin_entry_v1()->methods[0]; }
const qm_quantize_linear& PtqTable() {
  return *static_cast<const qm_quantize_linear*>(
      PtqMethod().ext(&PtqMethod(), QM_EXT_QUANTIZE_LINEAR));
}

qm_linear_info PtqInfo(int64_t rows, int64_t cols, qm_dtype scale_dtype = QM_F16) {
  qm_linear_info info = {};
  info.struct_size = sizeof info;
  info.name = "model.layers.0.mlp.up_proj";
  info.role = "mlp.up";
  info.out_features = rows;
  info.in_features = cols;
  info.weight_dtype = QM_BF16;
  info.scale_dtype = scale_dtype;
  return info;
}

std::vector<float> Gaussian(int64_t n, uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, 0.05f);
  std::vector<float> out(static_cast<size_t>(n));
  for (float& x : out) x = normal(engine);
  return out;
}

struct Setting {
  int bits = 4;
  int64_t group_size = 128;
  bool symmetric = false;
  std::string variant = "rtn";
  qm_dtype scale_dtype = QM_F16;
};

void Apply(const Setting& setting, FakeCall* call) {
  call->Defaults(PtqMethod())
      .Set("bits", std::to_string(setting.bits))
      .Set("group_size", std::to_string(setting.group_size))
      .Set("symmetric", setting.symmetric ? "true" : "false")
      .Set("variant", setting.variant);
}

qm_status Quantize(FakeCall& call, const qm_linear_info& info, const std::vector<float>& w,
                   qm_packed* out) {
  const qm_tensor weight = call.Tensor(w, {info.out_features, info.in_features});
  qm_stats stats = {};
  stats.struct_size = sizeof stats;
  return PtqTable().run(call.get(), &info, &weight, &stats, out);
}

// ---- the slow reference ------------------------------------------------------------------------
float RoundTo(qm_dtype dtype, float x) {
  if (dtype == QM_F32) return x;
  const int digits = dtype == QM_F16 ? 11 : 8, least = dtype == QM_F16 ? -24 : -133;
  int exponent;
  std::frexp(x, &exponent);
  const double step = std::ldexp(1.0, std::max(exponent - digits, least));
  const double rounded = std::nearbyint(x / step) * step;
  return static_cast<float>(
      rounded == 0.0 ? step : std::min(rounded, dtype == QM_F16 ? 65504.0 : 3.3895313892515355e38));
}

struct SlowGroup {
  float scale, zero;
};

SlowGroup SlowFromRange(float lo, float hi, const Setting& s) {
  const float max_code = std::ldexp(1.0f, s.bits) - 1;
  const float scale = RoundTo(s.scale_dtype, (hi - lo) / max_code);
  const float zero =
      s.symmetric ? (max_code + 1) / 2 : std::clamp(std::nearbyint(-lo / scale), 0.0f, max_code);
  return {scale, zero};
}

void SlowRange(const float* w, int64_t n, const Setting& s, float* lo, float* hi) {
  *lo = std::min(0.0f, *std::min_element(w, w + n));
  *hi = std::max(0.0f, *std::max_element(w, w + n));
  if (s.symmetric) {
    *hi = std::max(-*lo, *hi);
    *lo = -*hi;
  }
  if (*lo == 0 && *hi == 0) *lo = -1, *hi = 1;
}

int SlowCode(float x, SlowGroup g, int bits) {
  const float code = std::nearbyint(x / g.scale) + g.zero;
  return static_cast<int>(std::clamp(code, 0.0f, std::ldexp(1.0f, bits) - 1));
}

double SlowError(const float* w, int64_t n, SlowGroup g, int bits) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double d = static_cast<double>(g.scale) * (SlowCode(w[i], g, bits) - g.zero) - w[i];
    sum += d * d;
  }
  return sum;
}

class PtqSettings : public ::testing::TestWithParam<std::tuple<int, int64_t, bool, qm_dtype>> {
 protected:
  Setting Make(const std::string& variant) const {
    const auto [bits, group, symmetric, dtype] = GetParam();
    return {bits, group, symmetric, variant, dtype};
  }
};

constexpr int64_t kPtqRows = 9, kPtqCols = 384;

TEST_P(PtqSettings, RoundToNearestEqualsTheSlowReference) {
  const Setting s = Make("rtn");
  FakeCall call;
  Apply(s, &call);
  std::vector<float> w = Gaussian(kPtqRows * kPtqCols, 1);
  for (int64_t c = 0; c < kPtqCols; ++c) {
    w[1 * kPtqCols + c] = 0.0f;   // zeros
    w[2 * kPtqCols + c] = 0.25f;  // constant, no negatives
    w[3 * kPtqCols + c] = -std::fabs(w[3 * kPtqCols + c]);
    w[4 * kPtqCols + c] *= 1e-7f;  // scales below the least half
    w[5 * kPtqCols + c] *= 3e6f;
  }
  qm_packed packed = {};
  const qm_linear_info info = PtqInfo(kPtqRows, kPtqCols, s.scale_dtype);
  ASSERT_EQ(Quantize(call, info, w, &packed), QM_OK) << call.error();
  EXPECT_STREQ(packed.format_id, "qm.fmt.affine-int/1");
  EXPECT_EQ(packed.format_json, "{\"bits\":" + std::to_string(s.bits) +
                                    ",\"group_size\":" + std::to_string(s.group_size) +
                                    ",\"zero\":\"" + (s.symmetric ? "none" : "int") + "\"}");
  EXPECT_EQ(call.EmittedTensor(0, "scale").dtype, s.scale_dtype);
  const AffineContent got = ReadAffine(call, packed, s.bits);
  const int64_t width = s.group_size < 0 ? kPtqCols : s.group_size;
  for (int64_t r = 0; r < kPtqRows; ++r) {
    for (int64_t g = 0; g < kPtqCols / width; ++g) {
      const float* group = w.data() + r * kPtqCols + g * width;
      float lo, hi;
      SlowRange(group, width, s, &lo, &hi);
      const SlowGroup want = SlowFromRange(lo, hi, s);
      ASSERT_EQ(got.scale[r * got.groups + g], want.scale) << "row " << r << " group " << g;
      ASSERT_EQ(got.zero[r * got.groups + g], want.zero) << "row " << r << " group " << g;
      for (int64_t i = 0; i < width; ++i) {
        ASSERT_EQ(got.codes[r * kPtqCols + g * width + i], SlowCode(group[i], want, s.bits))
            << "row " << r << " column " << g * width + i;
      }
    }
  }
  EXPECT_TRUE(call.CanariesIntact());
}

TEST_P(PtqSettings, SearchFindsTheLeastSquaredError) {
  const Setting s = Make("mse");
  FakeCall call;
  Apply(s, &call);
  std::vector<float> w = Gaussian(kPtqRows * kPtqCols, 2);
  for (size_t i = 0; i < w.size(); i += 97) w[i] *= 6.0f;  // outliers worth clipping
  qm_packed packed = {};
  ASSERT_EQ(Quantize(call, PtqInfo(kPtqRows, kPtqCols, s.scale_dtype), w, &packed), QM_OK)
      << call.error();
  const AffineContent got = ReadAffine(call, packed, s.bits);
  const int64_t width = s.group_size < 0 ? kPtqCols : s.group_size;
  for (int64_t r = 0; r < kPtqRows; ++r) {
    for (int64_t g = 0; g < kPtqCols / width; ++g) {
      const float* group = w.data() + r * kPtqCols + g * width;
      float lo, hi;
      SlowRange(group, width, s, &lo, &hi);
      double best = INFINITY;
      for (int i = 0; i < 80; ++i) {
        const float p = 1.0f - static_cast<float>(i) / 100.0f;
        best = std::min(best, SlowError(group, width, SlowFromRange(p * lo, p * hi, s), s.bits));
      }
      const int64_t at = r * got.groups + g;
      const SlowGroup chosen = {static_cast<float>(got.scale[at]),
                                static_cast<float>(got.zero[at])};
      // Sums of n squares in f32 are off by at most n eps, hence so is the choice among near ties.
      const double slack = 1.0 + 2.0 * static_cast<double>(width) * 6e-8;
      EXPECT_LE(SlowError(group, width, chosen, s.bits), best * slack);
      for (int64_t i = 0; i < width; ++i) {
        ASSERT_EQ(got.codes[r * kPtqCols + g * width + i], SlowCode(group[i], chosen, s.bits));
      }
    }
  }
}

TEST_P(PtqSettings, PercentileIsTheInterpolatedQuantile) {
  const Setting s = Make("percentile");
  FakeCall call;
  Apply(s, &call);
  call.Set("percentile", "0.97");
  const std::vector<float> w = Gaussian(kPtqRows * kPtqCols, 3);
  qm_packed packed = {};
  ASSERT_EQ(Quantize(call, PtqInfo(kPtqRows, kPtqCols, s.scale_dtype), w, &packed), QM_OK)
      << call.error();
  const AffineContent got = ReadAffine(call, packed, s.bits);
  const int64_t width = s.group_size < 0 ? kPtqCols : s.group_size;
  const auto quantile = [&](std::vector<double> v, double q) {
    std::sort(v.begin(), v.end());
    const double at = q * static_cast<double>(v.size() - 1);
    const size_t k = static_cast<size_t>(at);
    return k + 1 < v.size() ? v[k] + (at - static_cast<double>(k)) * (v[k + 1] - v[k]) : v[k];
  };
  for (int64_t r = 0; r < kPtqRows; ++r) {
    for (int64_t g = 0; g < kPtqCols / width; ++g) {
      const float* group = w.data() + r * kPtqCols + g * width;
      std::vector<double> values(group, group + width), sizes;
      for (const double v : values) sizes.push_back(std::fabs(v));
      const double hi = s.symmetric ? quantile(sizes, 0.97) : std::max(0.0, quantile(values, 0.97));
      const double lo = s.symmetric ? -hi : std::min(0.0, quantile(values, 0.03));
      const double want = (hi - lo) / (std::ldexp(1.0, s.bits) - 1);
      const double eps = s.scale_dtype == QM_F16    ? 0x1p-11
                         : s.scale_dtype == QM_BF16 ? 0x1p-8
                                                    : 0x1p-21;
      EXPECT_NEAR(got.scale[r * got.groups + g], want, want * eps + 0x1p-25);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, PtqSettings,
                         ::testing::Combine(::testing::Values(2, 3, 4, 8),
                                            ::testing::Values<int64_t>(128, -1, 24, 1),
                                            ::testing::Bool(),
                                            ::testing::Values(QM_F16, QM_BF16, QM_F32)));

// codes (i mod 8) at 3 bits: the three words of the published 96-bit stream; 4 bits: 0x76543210.
TEST(Ptq, BitStreamEqualsPublishedVectors) {
  const auto words = [](int bits, int modulus) {
    FakeCall call;
    Apply({bits, -1, false, "rtn", QM_F32}, &call);
    std::vector<float> w;  // 0, 1/8, 2/8, ...: scale 1/8 and zero point 0, so the code is i mod m
    for (int i = 0; i < 32; ++i) w.push_back(0.125f * static_cast<float>(i % modulus));
    qm_packed packed = {};
    EXPECT_EQ(Quantize(call, PtqInfo(1, 32, QM_F32), w, &packed), QM_OK) << call.error();
    std::vector<uint32_t> out;
    for (const int32_t x : call.Read<int32_t>(0, "codes")) out.push_back(static_cast<uint32_t>(x));
    return out;
  };
  EXPECT_EQ(words(3, 8), (std::vector<uint32_t>{0x88FAC688, 0xC688FAC6, 0xFAC688FA}));
  EXPECT_EQ(words(2, 4), (std::vector<uint32_t>{0xE4E4E4E4, 0xE4E4E4E4}));
  EXPECT_EQ(words(4, 16)[0], 0x76543210u);
}

TEST(Ptq, UnusedBitsOfTheLastWordAreZero) {
  FakeCall call;
  Apply({3, -1, false, "rtn", QM_F16}, &call);
  qm_packed packed = {};
  ASSERT_EQ(Quantize(call, PtqInfo(2, 13), Gaussian(26, 4), &packed), QM_OK) << call.error();
  const std::vector<int32_t> words = call.Read<int32_t>(0, "codes");
  ASSERT_EQ(words.size(), 4u);
  EXPECT_EQ(static_cast<uint32_t>(words[1]) >> 7, 0u);
  EXPECT_EQ(static_cast<uint32_t>(words[3]) >> 7, 0u);
}

TEST(Ptq, ThreadsDoNotChangeTheBytes) {
  const std::vector<float> w = Gaussian(70 * 384, 5);
  std::vector<std::vector<int32_t>> results;
  for (const int threads : {0, 1, 3}) {
    FakeCall call;
    call.Threads(threads);
    Apply({4, 64, false, "mse", QM_F16}, &call);
    qm_packed packed = {};
    ASSERT_EQ(Quantize(call, PtqInfo(70, 384), w, &packed), QM_OK) << call.error();
    results.push_back(call.Read<int32_t>(0, "codes"));
  }
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(results[0], results[2]);
}

TEST(Ptq, RowsMayBeFartherApart) {
  FakeCall a, b;
  Apply({}, &a);
  Apply({}, &b);
  const std::vector<float> wide = Gaussian(4 * 256, 6);
  std::vector<float> narrow;
  for (int r = 0; r < 4; ++r) narrow.insert(narrow.end(), &wide[r * 256], &wide[r * 256] + 128);
  qm_tensor view = b.Tensor(wide, {4, 256});
  view.shape[1] = 128;
  qm_packed pa = {}, pb = {};
  const qm_linear_info info = PtqInfo(4, 128);
  ASSERT_EQ(Quantize(a, info, narrow, &pa), QM_OK);
  ASSERT_EQ(PtqTable().run(b.get(), &info, &view, nullptr, &pb), QM_OK) << b.error();
  EXPECT_EQ(a.Read<int32_t>(0, "codes"), b.Read<int32_t>(0, "codes"));
}

TEST(Ptq, NotFiniteWeightIsNamed) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    FakeCall call;
    call.Threads(2);
    Apply({}, &call);
    std::vector<float> w = Gaussian(20 * 128, 7);
    w[17 * 128 + 3] = bad;
    w[12 * 128 + 100] = bad;
    qm_packed packed = {};
    EXPECT_EQ(Quantize(call, PtqInfo(20, 128), w, &packed), QM_INVALID_ARGUMENT);
    EXPECT_NE(call.error().find("row 12, column 100"), std::string::npos) << call.error();
  }
}

TEST(Ptq, PlanRefusesWhatRunWould) {
  const auto plan = [](const char* name, const char* value, const qm_linear_info& info) {
    FakeCall call;
    Apply({}, &call);
    call.Set(name, value);
    qm_quant_plan out = {};
    out.struct_size = sizeof out;
    EXPECT_EQ(PtqTable().plan(call.get(), &info, &out), QM_INVALID_ARGUMENT) << name << value;
    return call.error();
  };
  EXPECT_NE(plan("group_size", "96", PtqInfo(8, 4096)).find("use 16, 32, 64, 128"),
            std::string::npos);
  EXPECT_NE(plan("group_size", "0", PtqInfo(8, 4096)).find("group_size 0"), std::string::npos);
  EXPECT_NE(plan("group_size", "-2", PtqInfo(8, 4096)).find("-1"), std::string::npos);
  EXPECT_NE(plan("bits", "5", PtqInfo(8, 4096)).find("2, 3, 4 or 8"), std::string::npos);
  EXPECT_NE(plan("variant", "best", PtqInfo(8, 4096)).find("percentile"), std::string::npos);
  EXPECT_NE(plan("percentile", "1.5", PtqInfo(8, 4096)).find("0.5 .. 1"), std::string::npos);
  EXPECT_NE(plan("bits", "4", PtqInfo(8, 4096, QM_I32)).find("scale"), std::string::npos);
  EXPECT_NE(plan("bits", "4", PtqInfo(0, 4096)).find("positive"), std::string::npos);
}

TEST(Ptq, PlanBoundsTheScratchOfRun) {
  FakeCall call;
  Apply({}, &call);
  const qm_linear_info info = PtqInfo(64, 256);
  qm_quant_plan plan = {};
  plan.struct_size = sizeof plan;
  ASSERT_EQ(PtqTable().plan(call.get(), &info, &plan), QM_OK);
  EXPECT_STREQ(plan.format_id, "qm.fmt.affine-int/1");
  EXPECT_EQ(plan.stat_count, 0u);
  EXPECT_GT(plan.flops, 0.0);
  call.ScratchLimit(plan.scratch_bytes);
  qm_packed packed = {};
  EXPECT_EQ(Quantize(call, info, Gaussian(64 * 256, 8), &packed), QM_OK) << call.error();
}

TEST(Ptq, EveryFailedAllocationIsReported) {
  const qm_linear_info info = PtqInfo(4, 128);
  FakeCall good;
  Apply({}, &good);
  qm_packed packed = {};
  ASSERT_EQ(Quantize(good, info, Gaussian(512, 9), &packed), QM_OK);
  for (int64_t n = 0; n < good.scratch_calls(); ++n) {
    FakeCall call;
    Apply({}, &call);
    call.FailScratchAt(n);
    EXPECT_EQ(Quantize(call, info, Gaussian(512, 9), &packed), QM_RESOURCE_EXHAUSTED) << n;
    EXPECT_FALSE(call.error().empty());
  }
  for (int64_t n = 0; n < good.emit_calls(); ++n) {
    FakeCall call;
    Apply({}, &call);
    call.FailEmitAt(n);
    EXPECT_EQ(Quantize(call, info, Gaussian(512, 9), &packed), QM_RESOURCE_EXHAUSTED) << n;
  }
}

TEST(Ptq, StopsWhenAsked) {
  FakeCall call;
  Apply({}, &call);
  call.CancelAt(1);
  qm_packed packed = {};
  EXPECT_EQ(Quantize(call, PtqInfo(64, 128), Gaussian(64 * 128, 10), &packed), QM_CANCELLED);
  EXPECT_LT(call.progress_calls(), 4);
}

TEST(Ptq, RefusesWrongTensors) {
  const qm_linear_info info = PtqInfo(4, 128);
  qm_packed packed = {};
  const auto error = [&](auto change) {
    FakeCall call;
    Apply({}, &call);
    qm_tensor w = call.Tensor(Gaussian(512, 11), {4, 128});
    change(w);
    EXPECT_EQ(PtqTable().run(call.get(), &info, &w, nullptr, &packed), QM_INVALID_ARGUMENT);
    return call.error();
  };
  EXPECT_NE(error([](qm_tensor& t) { t.dtype = QM_F16; }).find("dtype"), std::string::npos);
  EXPECT_NE(error([](qm_tensor& t) { t.shape[0] = 3; }).find("shape"), std::string::npos);
  EXPECT_NE(error([](qm_tensor& t) { t.stride[1] = 2; }).find("contiguous"), std::string::npos);
  EXPECT_NE(error([](qm_tensor& t) { t.device.kind = QM_CUDA; }).find("device"), std::string::npos);
}

TEST(Ptq, OffersItsCapabilityOnly) {
  EXPECT_NE(PtqMethod().ext(&PtqMethod(), "qm.quantize-linear/1"), nullptr);
  EXPECT_EQ(PtqMethod().ext(&PtqMethod(), "qm.quantize-linear/1 "), nullptr);
  EXPECT_EQ(PtqMethod().ext(&PtqMethod(), "qm.quantize-linear/2"), nullptr);
  EXPECT_EQ(PtqTable().run_group, nullptr);
}

#if defined(QM_HAVE_CUDA)
class PtqCuda : public ::testing::TestWithParam<std::tuple<int, int64_t, bool, std::string>> {};

TEST_P(PtqCuda, GivesTheBytesOfTheCpu) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no GPU";
  const auto [bits, group, symmetric, variant] = GetParam();
  const Setting s = {bits, group, symmetric, variant, QM_F16};
  const std::vector<float> w = Gaussian(67 * 768, 12);
  FakeCall cpu, gpu({QM_CUDA, 0});
  Apply(s, &cpu);
  Apply(s, &gpu);
  qm_packed a = {}, b = {};
  ASSERT_EQ(Quantize(cpu, PtqInfo(67, 768), w, &a), QM_OK) << cpu.error();
  ASSERT_EQ(Quantize(gpu, PtqInfo(67, 768), w, &b), QM_OK) << gpu.error();
  EXPECT_EQ(cpu.Read<int32_t>(0, "codes"), gpu.Read<int32_t>(0, "codes"));
  EXPECT_EQ(qm::testing::ReadScales(cpu, cpu.EmittedTensor(0, "scale")),
            qm::testing::ReadScales(gpu, gpu.EmittedTensor(0, "scale")));
  if (!symmetric) {
    EXPECT_EQ(cpu.Read<uint8_t>(0, "zero"), gpu.Read<uint8_t>(0, "zero"));
  }
}

TEST(PtqCuda, NotFiniteWeightIsNamed) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no GPU";
  FakeCall call({QM_CUDA, 0});
  Apply({}, &call);
  std::vector<float> w = Gaussian(20 * 128, 7);
  w[12 * 128 + 100] = std::numeric_limits<float>::quiet_NaN();
  qm_packed packed = {};
  EXPECT_EQ(Quantize(call, PtqInfo(20, 128), w, &packed), QM_INVALID_ARGUMENT);
  EXPECT_NE(call.error().find("row 12, column 100"), std::string::npos) << call.error();
}

INSTANTIATE_TEST_SUITE_P(All, PtqCuda,
                         ::testing::Combine(::testing::Values(2, 3, 4, 8),
                                            ::testing::Values<int64_t>(128, 256, -1, 24),
                                            ::testing::Bool(),
                                            ::testing::Values("rtn", "mse", "percentile")));
#endif

}  // namespace
