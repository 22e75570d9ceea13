// hqq against the published implementation (hqq_vectors.h), against the algorithm written out
// slowly, and CPU against CUDA.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "hqq_math.h"
#include "hqq_vectors.h"
#include "quantmill/quantize_linear.h"
#include "quantmill/testing/affine_reading.hpp"
#include "quantmill/testing/fake_call.hpp"

extern "C" const qm_plugin* qm_plugin_entry_v1(void);

namespace {

using qm::testing::FakeCall;

const qm_method& Method() { return *qm_plugin_entry_v1()->methods[0]; }
const qm_quantize_linear& Table() {
  return *static_cast<const qm_quantize_linear*>(Method().ext(&Method(), QM_EXT_QUANTIZE_LINEAR));
}

qm_linear_info Info(int64_t rows, int64_t cols, qm_dtype scale_dtype = QM_F16) {
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

std::vector<float> Gaussian(int64_t n, uint32_t seed, float sigma = 0.05f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, sigma);
  std::vector<float> out(static_cast<size_t>(n));
  for (float& x : out) x = normal(engine);
  return out;
}

struct Setting {
  int bits = 4;
  int64_t group_size = 64;
  int axis = 1;
  bool quantize_scale = false, quantize_zero = false;
};

FakeCall& Apply(const Setting& s, FakeCall* call) {
  return call->Defaults(Method())
      .Set("bits", std::to_string(s.bits))
      .Set("group_size", std::to_string(s.group_size))
      .Set("axis", std::to_string(s.axis))
      .Set("quantize_scale", s.quantize_scale ? "true" : "false")
      .Set("quantize_zero", s.quantize_zero ? "true" : "false");
}

qm_status Quantize(FakeCall& call, const qm_linear_info& info, const std::vector<float>& w,
                   qm_packed* out) {
  const qm_tensor weight = call.Tensor(w, {info.out_features, info.in_features});
  qm_stats stats = {};
  stats.struct_size = sizeof stats;
  return Table().run(call.get(), &info, &weight, &stats, out);
}

// What was emitted, unpacked: codes [rows, cols]; scale and zero point per group.
struct Content {
  std::vector<int> codes;
  std::vector<double> scale, zero;
};

std::vector<double> Widen(FakeCall& call, const char* name) {
  const qm_tensor& t = call.EmittedTensor(0, name);
  if (t.dtype != QM_U8) return qm::testing::ReadScales(call, t);
  const std::vector<float> range = call.Read<float>(0, std::string(name) + "_range");
  const std::vector<uint8_t> bytes = call.Read<uint8_t>(t);
  std::vector<double> out;
  for (size_t i = 0; i < bytes.size(); ++i) {
    const size_t block = range.size() == 2 ? 0 : i / 128;
    out.push_back(range[2 * block + 1] + range[2 * block] * bytes[i]);
  }
  return out;
}

Content Read(FakeCall& call, int64_t rows, int64_t cols, int bits) {
  Content out;
  const std::vector<int32_t> words = call.Read<int32_t>(0, "codes");
  const int64_t per_row = (cols * bits + 31) / 32;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      out.codes.push_back(static_cast<int>(qm::UnpackCode(words.data() + r * per_row, bits, c)));
    }
  }
  out.scale = Widen(call, "scale");
  out.zero = Widen(call, "zero");
  return out;
}

int64_t GroupOf(const Setting& s, int64_t rows, int64_t cols, int64_t r, int64_t c) {
  const int64_t whole = s.axis == 1 ? cols : rows;
  const int64_t size = s.group_size < 0 ? whole : s.group_size;
  return s.axis == 1 ? r * (cols / size) + c / size : r % (rows / size) * cols + c;
}

std::vector<double> Values(const Setting& s, int64_t rows, int64_t cols, const Content& content) {
  std::vector<double> out;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t g = GroupOf(s, rows, cols, r, c);
      out.push_back(content.scale[g] * (content.codes[r * cols + c] - content.zero[g]));
    }
  }
  return out;
}

// ---- the published implementation --------------------------------------------------------------
constexpr int64_t kOracleRows = 16, kOracleCols = 48;

// Sums of four 16-bit numbers, exact in f32; with outliers, every 61st is 8 times as large.
std::vector<float> OracleWeights(bool outliers) {
  std::vector<float> out;
  uint32_t state = 1;
  for (int i = 0; i < kOracleRows * kOracleCols; ++i) {
    int k = -131070;
    for (int j = 0; j < 4; ++j) {
      state = state * 1664525u + 1013904223u;
      k += static_cast<int>(state >> 16);
    }
    if (outliers && i % 61 == 7) k *= 8;
    out.push_back(std::ldexp(static_cast<float>(k), -19));
  }
  return out;
}

TEST(Hqq, EqualsThePublishedImplementation) {
  for (const hqq_vectors::Vector& want : hqq_vectors::All()) {
    SCOPED_TRACE(testing::Message()
                 << want.bits << " bits, axis " << want.axis << ", group " << want.group_size);
    FakeCall call;
    // This version's default solver has a kappa and leaves beta as it is.
    Apply({want.bits, want.group_size, want.axis}, &call).Set("kappa", "1");
    qm_packed packed = {};
    ASSERT_EQ(Quantize(call, Info(kOracleRows, kOracleCols, QM_F32), OracleWeights(want.outliers),
                       &packed),
              QM_OK)
        << call.error();
    const Content got = Read(call, kOracleRows, kOracleCols, want.bits);
    ASSERT_EQ(got.zero.size(), want.zero.size());
    // Six digits are listed; sums of n terms of about 2^bits differ in their order.
    for (size_t i = 0; i < want.zero.size(); ++i) {
      EXPECT_NEAR(got.zero[i], want.zero[i],
                  1e-5 * std::fabs(want.zero[i]) + std::ldexp(64e-7, want.bits));
    }
    const std::string text = want.codes;
    const size_t digits = want.bits == 8 ? 2 : 1;
    int differing = 0;
    for (size_t i = 0; i < got.codes.size(); ++i) {
      differing += got.codes[i] != std::stoi(text.substr(i * digits, digits), nullptr, 16);
    }
    EXPECT_EQ(differing, 0);
  }
}

// ---- the algorithm, slowly, in f64 -------------------------------------------------------------
struct SlowLayer {
  std::vector<double> scale, zero;
  double error = 0;  // mean |W - W'| of the result
};

// The scales are those of `got`: what is stored is the scale the solver works with.
SlowLayer Slow(const Setting& s, const std::vector<float>& w, int64_t rows, int64_t cols,
               const Content& got) {
  const double max_code = std::ldexp(1.0, s.bits) - 1;
  const size_t groups = got.scale.size();
  std::vector<std::vector<double>> members(groups);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      members[GroupOf(s, rows, cols, r, c)].push_back(w[r * cols + c]);
    }
  }
  SlowLayer out;
  out.scale = got.scale;
  for (size_t g = 0; g < groups; ++g) {
    const double low = *std::min_element(members[g].begin(), members[g].end());
    out.zero.push_back(-low / got.scale[g]);
  }
  const auto code = [&](double x, size_t g) {
    return std::clamp(std::nearbyint(x / out.scale[g] + out.zero[g]), 0.0, max_code);
  };
  double beta = 10, best = INFINITY;
  for (int t = 0; t < 20; ++t, beta *= 1.01) {
    double error = 0;
    for (size_t g = 0; g < groups; ++g) {
      double sum = 0;
      for (const double x : members[g]) {
        const double q = code(x, g), r = x - (q - out.zero[g]) * out.scale[g];
        const double e = std::max(std::fabs(r) - std::pow(std::fabs(r), -0.3) / beta, 0.0);
        error += std::fabs(r);
        sum += q - (x - std::copysign(e, r)) / out.scale[g];
      }
      out.zero[g] = sum / static_cast<double>(members[g].size());
    }
    error /= static_cast<double>(w.size());
    if (!(error < best)) break;
    best = error;
  }
  for (size_t g = 0; g < groups; ++g) {
    for (const double x : members[g]) {
      out.error += std::fabs(x - (code(x, g) - out.zero[g]) * out.scale[g]);
    }
  }
  out.error /= static_cast<double>(w.size());
  return out;
}

using Case = std::tuple<int, int64_t, int, qm_dtype>;
class HqqSettings : public ::testing::TestWithParam<Case> {};

TEST_P(HqqSettings, EqualsTheAlgorithmWrittenOut) {
  const auto [bits, group, axis, dtype] = GetParam();
  const Setting s = {bits, group, axis};
  const int64_t rows = 64, cols = 96;
  std::vector<float> w = Gaussian(rows * cols, 1, 0.3f);  // errors beyond the threshold too
  for (size_t i = 0; i < w.size(); i += 89) w[i] *= 5.0f;
  FakeCall call;
  Apply(s, &call);
  qm_packed packed = {};
  ASSERT_EQ(Quantize(call, Info(rows, cols, dtype), w, &packed), QM_OK) << call.error();
  EXPECT_TRUE(call.CanariesIntact());
  EXPECT_STREQ(packed.format_id, "qm.fmt.affine-int/1");
  const bool whole = group < 0 || group == (axis == 1 ? cols : rows);
  EXPECT_EQ(packed.format_json, std::string("{") + (axis == 0 ? "\"axis\":0," : "") +
                                    "\"bits\":" + std::to_string(bits) + ",\"group_size\":" +
                                    std::to_string(whole ? -1 : group) + ",\"zero\":\"float\"}");
  const Content got = Read(call, rows, cols, bits);
  const SlowLayer want = Slow(s, w, rows, cols, got);
  double error = 0;
  const std::vector<double> values = Values(s, rows, cols, got);
  for (size_t i = 0; i < w.size(); ++i) error += std::fabs(values[i] - w[i]);
  error /= static_cast<double>(w.size());
  // A weight on the edge between two codes moves a mean by 1 / n; few groups hold one. The error is
  // flat there: it agrees but for the rounding of the stored zero point, which shifts a group.
  const double stored = dtype == QM_F16 ? 0x1p-11 : dtype == QM_BF16 ? 0x1p-8 : 0x1p-21;
  double shift = 0;
  for (size_t g = 0; g < want.zero.size(); ++g) {
    shift +=
        stored * std::fabs(want.zero[g]) * want.scale[g] / static_cast<double>(want.zero.size());
  }
  size_t apart = 0;
  for (size_t g = 0; g < want.zero.size(); ++g) {
    apart += std::fabs(got.zero[g] - want.zero[g]) >
             2 * stored * std::fabs(want.zero[g]) + std::ldexp(1e-5, bits);
  }
  EXPECT_LE(apart, want.zero.size() / 50 + 1);
  EXPECT_NEAR(error, want.error, want.error * 2e-3 + shift);
  // Codes are the nearest for the stored scale and zero point.
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t g = GroupOf(s, rows, cols, r, c);
      const double exact =
          std::clamp(w[r * cols + c] / got.scale[g] + got.zero[g], 0.0, std::ldexp(1.0, bits) - 1);
      ASSERT_LE(std::fabs(got.codes[r * cols + c] - exact), 0.5 + 1e-4) << r << ", " << c;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, HqqSettings,
                         ::testing::Combine(::testing::Values(1, 2, 3, 4, 8),
                                            ::testing::Values<int64_t>(16, 32, -1),
                                            ::testing::Values(0, 1),
                                            ::testing::Values(QM_F16, QM_BF16, QM_F32)));

TEST(Hqq, QuantizedMetadataCostsLittle) {
  const int64_t rows = 96, cols = 128;  // 768 scales
  const std::vector<float> w = Gaussian(rows * cols, 2);
  const auto error = [&](const Setting& s) {
    FakeCall call;
    Apply(s, &call);
    qm_packed packed = {};
    EXPECT_EQ(Quantize(call, Info(rows, cols), w, &packed), QM_OK) << call.error();
    EXPECT_EQ(call.EmittedTensor(0, "scale").dtype, s.quantize_scale ? QM_U8 : QM_F16);
    EXPECT_EQ(call.EmittedTensor(0, "zero").dtype, s.quantize_zero ? QM_U8 : QM_F16);
    const std::vector<double> values = Values(s, rows, cols, Read(call, rows, cols, s.bits));
    double sum = 0;
    for (size_t i = 0; i < w.size(); ++i) sum += std::fabs(values[i] - w[i]);
    return sum;
  };
  for (const int axis : {0, 1}) {
    const double plain = error({4, 16, axis});
    EXPECT_LT(error({4, 16, axis, true, false}), 1.01 * plain);
    EXPECT_LT(error({4, 16, axis, false, true}), 1.01 * plain);
    EXPECT_LT(error({4, 16, axis, true, true}), 1.02 * plain);
  }
}

TEST(Hqq, NoIterationsKeepTheRange) {
  FakeCall call;
  Apply({3, -1, 1}, &call).Set("iterations", "0");
  qm_packed packed = {};
  ASSERT_EQ(Quantize(call, Info(1, 8, QM_F32), {-1, 0, 1, 2, 3, 4, 5, 6}, &packed), QM_OK);
  const Content got = Read(call, 1, 8, 3);
  EXPECT_EQ(got.codes, (std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(got.scale[0], 1.0);
  EXPECT_EQ(got.zero[0], 1.0);
}

// ---- layers out of the ordinary ----------------------------------------------------------------
// Half a unit in the last place, relative.
double Rounding(qm_dtype dtype) {
  return dtype == QM_F16 ? 0x1p-11 : dtype == QM_BF16 ? 0x1p-8 : 0x1p-22;
}

using Extreme = std::tuple<int, int, qm_dtype, bool>;
class HqqExtremes : public ::testing::TestWithParam<Extreme> {
 protected:
  // Scale and zero point of every group finite, whatever the weights are.
  Content Run(const std::vector<float>& w, const Setting& s, qm_dtype dtype) {
    FakeCall call;
    Apply(s, &call);
    qm_packed packed = {};
    EXPECT_EQ(Quantize(call, Info(32, 32, dtype), w, &packed), QM_OK) << call.error();
    const Content got = Read(call, 32, 32, s.bits);
    for (const double scale : got.scale) EXPECT_TRUE(std::isfinite(scale) && scale > 0) << scale;
    for (const double zero : got.zero) EXPECT_TRUE(std::isfinite(zero)) << zero;
    return got;
  }
};

TEST_P(HqqExtremes, ConstantRowsAreKept) {
  const auto [bits, axis, dtype, bytes] = GetParam();
  const Setting s = {bits, 16, axis, bytes, bytes};
  std::vector<float> w = Gaussian(32 * 32, 3);
  for (int c = 0; c < 32; ++c) {
    w[1 * 32 + c] = 0.0f;
    w[2 * 32 + c] = -0.0f;
    w[3 * 32 + c] = 0.25f;
    w[4 * 32 + c] *= 1e-30f;
    w[5 * 32 + c] = -1000.0f;
  }
  const Content got = Run(w, s, dtype);
  if (axis == 0 || bytes) return;  // there such rows share scales or ranges with others
  const std::vector<double> values = Values(s, 32, 32, got);
  const double stored = Rounding(dtype);
  for (int c = 0; c < 32; ++c) {
    EXPECT_EQ(values[1 * 32 + c], 0.0);
    EXPECT_EQ(values[2 * 32 + c], 0.0);
    EXPECT_NEAR(values[3 * 32 + c], 0.25, 0.25 * stored + 1e-7);
    EXPECT_NEAR(values[4 * 32 + c], 0.0, 1e-20);
    EXPECT_NEAR(values[5 * 32 + c], -1000, 1000 * stored);
  }
}

TEST_P(HqqExtremes, HugeWeightsLeaveTheOtherRowsAlone) {
  const auto [bits, axis, dtype, bytes] = GetParam();
  const Setting s = {bits, 16, axis, bytes, bytes};
  std::vector<float> w = Gaussian(32 * 32, 3);
  for (int c = 0; c < 32; ++c) w[1 * 32 + c] = 5e4f + static_cast<float>(c);
  w[7 * 32] = std::numeric_limits<float>::max();
  w[8 * 32] = -std::numeric_limits<float>::max();
  w[8 * 32 + 1] = std::numeric_limits<float>::max();
  w[9 * 32] = 1e9f;
  const Content got = Run(w, s, dtype);
  if (axis == 0 || bytes) return;
  const std::vector<double> values = Values(s, 32, 32, got);
  const double step = 0.4 / (std::ldexp(1.0, bits) - 1);  // no group spans more than 8 sigma
  for (int c = 0; c < 32; ++c) {
    // Within [0, 5e4 + 31] the largest code meets the row; the rounded scale is off by `stored`.
    EXPECT_NEAR(values[1 * 32 + c], w[1 * 32 + c], 5e4 * 4 * Rounding(dtype) + 64);
    EXPECT_NEAR(values[20 * 32 + c], w[20 * 32 + c], step + 0.02);
  }
}

INSTANTIATE_TEST_SUITE_P(All, HqqExtremes,
                         ::testing::Combine(::testing::Values(1, 2, 3, 4, 8),
                                            ::testing::Values(0, 1),
                                            ::testing::Values(QM_F16, QM_BF16, QM_F32),
                                            ::testing::Bool()));

TEST(Hqq, OneRowOneColumnOneWeight) {
  const auto run = [](int64_t rows, int64_t cols, const Setting& s) {
    FakeCall call;
    Apply(s, &call);
    qm_packed packed = {};
    const std::vector<float> w = Gaussian(rows * cols, 4);
    EXPECT_EQ(Quantize(call, Info(rows, cols, QM_F32), w, &packed), QM_OK) << call.error();
    const std::vector<double> values = Values(s, rows, cols, Read(call, rows, cols, s.bits));
    double worst = 0;
    for (size_t i = 0; i < w.size(); ++i) worst = std::max(worst, std::fabs(values[i] - w[i]));
    return worst;
  };
  EXPECT_LT(run(1, 256, {8, 64, 1}), 0.01);
  EXPECT_LT(run(1, 37, {8, -1, 1}), 0.01);
  EXPECT_LT(run(1, 37, {8, 1, 0}), 1e-6);  // a group of one weight is stored as it is
  EXPECT_LT(run(37, 1, {8, 1, 1}), 1e-6);
  EXPECT_LT(run(37, 1, {8, -1, 0}), 0.01);
  EXPECT_LT(run(1, 1, {1, -1, 1}), 1e-6);
}

TEST(Hqq, NotFiniteWeightIsNamed) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    FakeCall call;
    Apply({}, &call);
    std::vector<float> w = Gaussian(20 * 128, 7);
    w[17 * 128 + 3] = bad;
    w[12 * 128 + 100] = bad;
    qm_packed packed = {};
    EXPECT_EQ(Quantize(call, Info(20, 128), w, &packed), QM_INVALID_ARGUMENT);
    EXPECT_NE(call.error().find("row 12, column 100"), std::string::npos) << call.error();
  }
}

// ---- the call ----------------------------------------------------------------------------------
TEST(Hqq, ThreadsDoNotChangeTheBytes) {
  const std::vector<float> w = Gaussian(96 * 384, 5);
  for (const int axis : {0, 1}) {
    std::vector<std::vector<int32_t>> results;
    for (const int threads : {0, 1, 3}) {
      FakeCall call;
      call.Threads(threads);
      Apply({3, 32, axis}, &call);
      qm_packed packed = {};
      ASSERT_EQ(Quantize(call, Info(96, 384), w, &packed), QM_OK) << call.error();
      results.push_back(call.Read<int32_t>(0, "codes"));
    }
    EXPECT_EQ(results[0], results[1]);
    EXPECT_EQ(results[0], results[2]);
  }
}

TEST(Hqq, RowsMayBeFartherApart) {
  for (const int axis : {0, 1}) {
    FakeCall a, b;
    Apply({4, 4, axis}, &a);
    Apply({4, 4, axis}, &b);
    const std::vector<float> wide = Gaussian(4 * 256, 6);
    std::vector<float> narrow;
    for (int r = 0; r < 4; ++r) narrow.insert(narrow.end(), &wide[r * 256], &wide[r * 256] + 128);
    qm_tensor view = b.Tensor(wide, {4, 256});
    view.shape[1] = 128;
    qm_packed pa = {}, pb = {};
    const qm_linear_info info = Info(4, 128);
    ASSERT_EQ(Quantize(a, info, narrow, &pa), QM_OK);
    ASSERT_EQ(Table().run(b.get(), &info, &view, nullptr, &pb), QM_OK) << b.error();
    EXPECT_EQ(a.Read<int32_t>(0, "codes"), b.Read<int32_t>(0, "codes"));
  }
}

TEST(Hqq, PlanRefusesWhatRunWould) {
  const auto plan = [](const std::vector<std::pair<const char*, const char*>>& options,
                       const qm_linear_info& info) {
    FakeCall call;
    Apply({}, &call);
    for (const auto& [name, value] : options) call.Set(name, value);
    qm_quant_plan out = {};
    out.struct_size = sizeof out;
    EXPECT_EQ(Table().plan(call.get(), &info, &out), QM_INVALID_ARGUMENT) << options[0].first;
    return call.error();
  };
  const auto names = [](const std::string& text, const char* part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  names(plan({{"group_size", "96"}}, Info(8, 4096)), "use 8, 16, 32");
  names(plan({{"group_size", "64"}, {"axis", "0"}}, Info(96, 64)), "out_features 96");
  names(plan({{"group_size", "0"}}, Info(8, 4096)), "group_size 0");
  names(plan({{"group_size", "-2"}}, Info(8, 4096)), "-1");
  names(plan({{"bits", "5"}}, Info(8, 4096)), "8, 4, 3, 2 or 1");
  names(plan({{"axis", "2"}}, Info(8, 4096)), "0 or 1");
  names(plan({{"norm", "0"}}, Info(8, 4096)), "norm");
  names(plan({{"beta", "0"}}, Info(8, 4096)), "beta");
  names(plan({{"kappa", "0.5"}}, Info(8, 4096)), "kappa");
  names(plan({{"iterations", "-1"}}, Info(8, 4096)), "iterations");
  names(plan({{"bits", "4"}}, Info(8, 4096, QM_I32)), "scale");
  names(plan({{"bits", "4"}}, Info(0, 4096)), "positive");
}

TEST(Hqq, PlanBoundsTheScratchOfRun) {
  for (const Setting& s : {Setting{}, Setting{2, 16, 0, true, true}}) {
    FakeCall call;
    Apply(s, &call);
    const qm_linear_info info = Info(64, 256);
    qm_quant_plan plan = {};
    plan.struct_size = sizeof plan;
    ASSERT_EQ(Table().plan(call.get(), &info, &plan), QM_OK);
    EXPECT_STREQ(plan.format_id, "qm.fmt.affine-int/1");
    EXPECT_EQ(plan.stat_count, 0u);
    EXPECT_GT(plan.flops, 0.0);
    call.ScratchLimit(plan.scratch_bytes);
    qm_packed packed = {};
    EXPECT_EQ(Quantize(call, info, Gaussian(64 * 256, 8), &packed), QM_OK) << call.error();
  }
}

TEST(Hqq, EveryFailedAllocationIsReported) {
  const qm_linear_info info = Info(4, 128);
  const Setting s = {4, 64, 1, true, true};
  FakeCall good;
  Apply(s, &good);
  qm_packed packed = {};
  ASSERT_EQ(Quantize(good, info, Gaussian(512, 9), &packed), QM_OK);
  for (int64_t n = 0; n < good.scratch_calls(); ++n) {
    FakeCall call;
    Apply(s, &call).FailScratchAt(n);
    EXPECT_EQ(Quantize(call, info, Gaussian(512, 9), &packed), QM_RESOURCE_EXHAUSTED) << n;
    EXPECT_FALSE(call.error().empty());
  }
  for (int64_t n = 0; n < good.emit_calls(); ++n) {
    FakeCall call;
    Apply(s, &call).FailEmitAt(n);
    EXPECT_EQ(Quantize(call, info, Gaussian(512, 9), &packed), QM_RESOURCE_EXHAUSTED) << n;
  }
}

TEST(Hqq, StopsWhenAsked) {
  FakeCall call;
  Apply({}, &call).CancelAt(1);
  qm_packed packed = {};
  EXPECT_EQ(Quantize(call, Info(256, 128), Gaussian(256 * 128, 10), &packed), QM_CANCELLED);
  EXPECT_LT(call.progress_calls(), 4);
}

TEST(Hqq, RefusesWrongTensors) {
  const qm_linear_info info = Info(4, 128);
  qm_packed packed = {};
  const auto error = [&](auto change) {
    FakeCall call;
    Apply({}, &call);
    qm_tensor w = call.Tensor(Gaussian(512, 11), {4, 128});
    change(w);
    EXPECT_EQ(Table().run(call.get(), &info, &w, nullptr, &packed), QM_INVALID_ARGUMENT);
    return call.error();
  };
  EXPECT_NE(error([](qm_tensor& t) { t.dtype = QM_F16; }).find("dtype"), std::string::npos);
  EXPECT_NE(error([](qm_tensor& t) { t.shape[0] = 3; }).find("shape"), std::string::npos);
  EXPECT_NE(error([](qm_tensor& t) { t.device.kind = QM_CUDA; }).find("device"), std::string::npos);
}

TEST(Hqq, OffersItsCapabilityOnly) {
  EXPECT_NE(Method().ext(&Method(), "qm.quantize-linear/1"), nullptr);
  EXPECT_EQ(Method().ext(&Method(), "qm.quantize-linear/1 "), nullptr);
  EXPECT_EQ(Method().ext(&Method(), "qm.format/1"), nullptr);
}

TEST(Hqq, PowerIsThatOfTheLibrary) {
  for (double x = 1e-6; x < 1e30; x *= 1.37) {
    const float size = static_cast<float>(x);
    for (const double p : {-0.9, -0.3, -0.05}) {
      const double want = std::pow(static_cast<double>(size), p);
      const double got = quantmill::hqq::Exp2(static_cast<float>(p) * quantmill::hqq::Log2(size));
      EXPECT_NEAR(got, want, want * 2e-5) << size << "^" << p;
    }
  }
}

#if defined(QM_HAVE_CUDA)
class HqqCuda : public ::testing::TestWithParam<std::tuple<int, int64_t, int, bool>> {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no GPU";
  }
};

// Number of elements that differ.
template <class T>
int64_t Differing(FakeCall& cpu, FakeCall& gpu, const char* name) {
  const std::vector<T> a = cpu.Read<T>(0, name), b = gpu.Read<T>(0, name);
  int64_t count = a.size() == b.size() ? 0 : -1;
  for (size_t i = 0; i < a.size() && count >= 0; ++i) {
    count += std::memcmp(&a[i], &b[i], sizeof(T)) != 0;
  }
  return count;
}

TEST_P(HqqCuda, GivesTheBytesOfTheCpu) {
  const auto [bits, group, axis, bytes] = GetParam();
  const Setting s = {bits, group, axis, bytes, bytes};
  const int64_t rows = 96, cols = 704;
  std::vector<float> w = Gaussian(rows * cols, 12, 0.2f);
  for (size_t i = 0; i < w.size(); i += 97) w[i] *= 6.0f;
  std::fill_n(w.begin() + 5 * cols, cols, 0.0f);
  std::fill_n(w.begin() + 6 * cols, cols, 0.25f);
  w[7 * cols] = 1e30f;
  FakeCall cpu, gpu({QM_CUDA, 0});
  Apply(s, &cpu);
  Apply(s, &gpu);
  qm_packed a = {}, b = {};
  ASSERT_EQ(Quantize(cpu, Info(rows, cols), w, &a), QM_OK) << cpu.error();
  ASSERT_EQ(Quantize(gpu, Info(rows, cols), w, &b), QM_OK) << gpu.error();
  EXPECT_STREQ(a.format_json, b.format_json);
  EXPECT_EQ(Differing<int32_t>(cpu, gpu, "codes"), 0);
  if (bytes) {
    EXPECT_EQ(Differing<uint8_t>(cpu, gpu, "scale"), 0);
    EXPECT_EQ(Differing<uint8_t>(cpu, gpu, "zero"), 0);
    EXPECT_EQ(Differing<float>(cpu, gpu, "scale_range"), 0);
    EXPECT_EQ(Differing<float>(cpu, gpu, "zero_range"), 0);
  } else {
    EXPECT_EQ(Differing<qm::F16>(cpu, gpu, "scale"), 0);
    EXPECT_EQ(Differing<qm::F16>(cpu, gpu, "zero"), 0);
  }
}

INSTANTIATE_TEST_SUITE_P(All, HqqCuda,
                         ::testing::Combine(::testing::Values(1, 2, 3, 4, 8),
                                            ::testing::Values<int64_t>(16, 32, -1),
                                            ::testing::Values(0, 1), ::testing::Bool()));

TEST(HqqCudaErrors, NotFiniteWeightIsNamed) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no GPU";
  for (const int axis : {0, 1}) {
    FakeCall call({QM_CUDA, 0});
    Apply({4, 4, axis}, &call);
    std::vector<float> w = Gaussian(20 * 128, 7);
    w[12 * 128 + 100] = std::numeric_limits<float>::quiet_NaN();
    w[17 * 128 + 3] = std::numeric_limits<float>::infinity();
    qm_packed packed = {};
    EXPECT_EQ(Quantize(call, Info(20, 128), w, &packed), QM_INVALID_ARGUMENT);
    EXPECT_NE(call.error().find("row 12, column 100"), std::string::npos) << call.error();
  }
}
#endif

}  // namespace
