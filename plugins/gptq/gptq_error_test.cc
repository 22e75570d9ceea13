// gptq on bad statistics, bad options, failing memory, and inputs nobody saw.
#include <gtest/gtest.h>

#include <limits>

#include "gptq_testing.h"

namespace quantmill::gptq::testing {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

bool Logged(const FakeCall& call, const std::string& text) {
  return std::any_of(call.logs().begin(), call.logs().end(),
                     [&](const auto& line) { return line.second.find(text) != std::string::npos; });
}

// Codes of plain rounding, from a call whose linear saw no input.
std::vector<int32_t> PlainCodes(const Setting& s, Problem p) {
  p.samples = 0;
  FakeCall call;
  Apply(s, &call);
  qm_packed packed = {};
  EXPECT_EQ(Quantize(call, s, p, &packed), QM_OK) << call.error();
  EXPECT_TRUE(Logged(call, "no calibration row"));
  return call.Read<int32_t>(0, "codes");
}

TEST(GptqErrors, NoRowsMeansPlainRounding) {
  const Problem p = MakeProblem(5, 96, 100, 1);
  for (const bool symmetric : {false, true}) {
    Setting s;
    s.symmetric = symmetric;
    s.act_order = true;
    FakeCall call;
    Apply(s, &call);
    Problem unseen = p;
    unseen.samples = 0;
    qm_packed packed = {};
    ASSERT_EQ(Quantize(call, s, unseen, &packed), QM_OK) << call.error();
    const AffineContent got = ReadAffine(call, packed, s.bits);
    for (int64_t c = 0; c < p.cols; ++c) EXPECT_EQ(got.group_of[c], c / 32);
    for (int64_t r = 0; r < p.rows; ++r) {
      for (int64_t c = 0; c < p.cols; ++c) {
        const float scale = static_cast<float>(got.scale[r * 3 + c / 32]);
        const float zero = static_cast<float>(got.zero[r * 3 + c / 32]);
        const float code = std::nearbyint(p.w[r * p.cols + c] / scale) + zero;
        EXPECT_EQ(got.codes[r * p.cols + c], std::clamp(code, 0.0f, 15.0f));
      }
    }
  }
}

TEST(GptqErrors, StatisticsMayBeAbsentWithoutRows) {
  FakeCall call;
  Apply({}, &call);
  const Problem p = MakeProblem(3, 64, 10, 2);
  const qm_linear_info info = Info(3, 64);
  const qm_tensor w = call.Tensor(p.w, {3, 64});
  qm_stats none = {sizeof(qm_stats), nullptr, 0, 0};
  qm_packed packed = {};
  EXPECT_EQ(Table().run(call.get(), &info, &w, &none, &packed), QM_OK) << call.error();
}

TEST(GptqErrors, InputsAlwaysZeroMeanPlainRounding) {
  Setting s;
  Problem p = MakeProblem(5, 96, 100, 3);
  const std::vector<int32_t> want = PlainCodes(s, p);
  std::fill(p.hessian.begin(), p.hessian.end(), 0.0f);
  FakeCall call;
  Apply(s, &call);
  qm_packed packed = {};
  ASSERT_EQ(Quantize(call, s, p, &packed), QM_OK) << call.error();
  EXPECT_TRUE(Logged(call, "inputs of this linear are 0"));
  EXPECT_EQ(call.Read<int32_t>(0, "codes"), want);
}

TEST(GptqErrors, SingularHessianIsDamped) {
  Setting s;
  const Problem p = MakeProblem(5, 96, 4, 4);  // rank 4 of 96
  FakeCall call;
  Apply(s, &call);
  qm_packed packed = {};
  ASSERT_EQ(Quantize(call, s, p, &packed), QM_OK) << call.error();
  EXPECT_EQ(call.cholesky_calls(), 1);
  for (const double q : ReadAffine(call, packed, s.bits).Values()) EXPECT_TRUE(std::isfinite(q));
}

TEST(GptqErrors, DampGrowsUntilTheFactorExists) {
  Setting s;
  const Problem p = MakeProblem(5, 96, 200, 5);
  FakeCall call;
  Apply(s, &call);
  call.CholeskyNeedsDamp(0.035);
  qm_packed packed = {};
  ASSERT_EQ(Quantize(call, s, p, &packed), QM_OK) << call.error();
  EXPECT_EQ(call.cholesky_calls(), 4);  // 0.01, 0.02, 0.03, 0.04
  EXPECT_TRUE(Logged(call, "needed damp 0.04 instead of 0.01"));
}

TEST(GptqErrors, DiagonalFloorRepairsAnIndefiniteHessian) {
  Setting s;
  s.damp = 0.0;
  Problem p = MakeProblem(5, 64, 200, 6);
  // A pair of weak channels with a correlation far above 1 beside a strong one: a damp below 1 adds
  // too little, since it is relative to the mean; a floor is relative to the strongest.
  std::fill(p.hessian.begin(), p.hessian.end(), 0.0f);
  for (int64_t i = 0; i < 64; ++i) p.hessian[i * 64 + i] = 1e-3f;
  p.hessian[0] = 1.0f;
  p.hessian[1 * 64 + 2] = p.hessian[2 * 64 + 1] = 0.05f;
  FakeCall call;
  Apply(s, &call);
  qm_packed packed = {};
  ASSERT_EQ(Quantize(call, s, p, &packed), QM_OK) << call.error();
  EXPECT_TRUE(Logged(call, "diagonal raised"));
  EXPECT_FALSE(Logged(call, "rounded to nearest"));
}

TEST(GptqErrors, HopelessHessianMeansPlainRounding) {
  Setting s;
  s.act_order = true;
  const Problem p = MakeProblem(5, 64, 200, 7);
  const std::vector<int32_t> want = PlainCodes(s, p);
  FakeCall call;
  Apply(s, &call);
  call.CholeskyNeedsDamp(2.0);
  qm_packed packed = {};
  ASSERT_EQ(Quantize(call, s, p, &packed), QM_OK) << call.error();
  EXPECT_TRUE(Logged(call, "no damping"));
  EXPECT_EQ(call.Read<int32_t>(0, "codes"), want);
}

TEST(GptqErrors, NotFiniteInputsAreNamed) {
  Setting s;
  s.alpha = 0.25;
  const Problem good = MakeProblem(40, 64, 100, 8);
  const auto error = [&](auto change) {
    Problem p = good;
    change(p);
    FakeCall call;
    call.Threads(2);
    Apply(s, &call);
    qm_packed packed = {};
    EXPECT_EQ(Quantize(call, s, p, &packed), QM_INVALID_ARGUMENT);
    return call.error();
  };
  EXPECT_NE(error([](Problem& p) { p.w[35 * 64 + 5] = kNaN; }).find("row 35, column 5"),
            std::string::npos);
  EXPECT_NE(error([](Problem& p) { p.w[3] = INFINITY; }).find("row 0, column 3"),
            std::string::npos);
  EXPECT_NE(error([](Problem& p) { p.hessian[70] = kNaN; }).find("\"hessian\""), std::string::npos);
  EXPECT_NE(error([](Problem& p) { p.cross[70] = INFINITY; }).find("\"cross\""), std::string::npos);
}

TEST(GptqErrors, MissingThingsAreNamed) {
  const Problem p = MakeProblem(4, 64, 100, 9);
  const qm_linear_info info = Info(4, 64);
  qm_packed packed = {};
  {
    FakeCall call;
    Apply({}, &call);
    const qm_tensor w = call.Tensor(p.w, {4, 64});
    qm_stats none = {sizeof(qm_stats), nullptr, 0, 100};
    EXPECT_EQ(Table().run(call.get(), &info, &w, &none, &packed), QM_FAILED_PRECONDITION);
    EXPECT_NE(call.error().find("\"hessian\""), std::string::npos);
  }
  {
    FakeCall call;
    Apply({}, &call);
    call.Set("asymmetric_error", "0.25");
    Stats stats(call, p, false);
    const qm_tensor w = call.Tensor(p.w, {4, 64});
    EXPECT_EQ(Table().run(call.get(), &info, &w, stats.get(), &packed), QM_FAILED_PRECONDITION);
    EXPECT_NE(call.error().find("\"cross\""), std::string::npos);
  }
  {
    FakeCall call;
    Apply({}, &call);
    call.WithoutLinalg();
    EXPECT_EQ(Quantize(call, {}, p, &packed), QM_FAILED_PRECONDITION);
    EXPECT_NE(call.error().find("qm.host.linalg/1"), std::string::npos);
  }
}

TEST(GptqErrors, PlanRefusesWhatRunWould) {
  const auto plan = [](const char* name, const char* value) {
    FakeCall call;
    Apply({}, &call);
    call.Set(name, value);
    const qm_linear_info info = Info(8, 4096);
    qm_quant_plan out = {};
    out.struct_size = sizeof out;
    EXPECT_EQ(Table().plan(call.get(), &info, &out), QM_INVALID_ARGUMENT) << name << value;
    return call.error();
  };
  EXPECT_NE(plan("group_size", "96").find("use 16, 32, 64, 128"), std::string::npos);
  EXPECT_NE(plan("bits", "5").find("2, 3, 4 or 8"), std::string::npos);
  EXPECT_NE(plan("damp", "-0.1").find("damp"), std::string::npos);
  EXPECT_NE(plan("block_size", "0").find("block_size"), std::string::npos);
  EXPECT_NE(plan("block_size", "512").find("block_size"), std::string::npos);
  EXPECT_NE(plan("asymmetric_error", "2").find("asymmetric_error"), std::string::npos);
}

TEST(GptqErrors, PlanBoundsTheScratchOfRunAndNamesStatistics) {
  for (const double alpha : {0.0, 0.25}) {
    Setting s;
    s.act_order = true;
    s.alpha = alpha;
    const Problem p = MakeProblem(64, 128, 200, 10, {5});
    FakeCall call;
    Apply(s, &call);
    const qm_linear_info info = Info(p.rows, p.cols);
    qm_quant_plan plan = {};
    plan.struct_size = sizeof plan;
    ASSERT_EQ(Table().plan(call.get(), &info, &plan), QM_OK);
    ASSERT_EQ(plan.stat_count, alpha > 0 ? 2u : 1u);
    EXPECT_STREQ(plan.stats[0].stat_id, "hessian");
    if (alpha > 0) {
      EXPECT_STREQ(plan.stats[1].stat_id, "cross");
    }
    EXPECT_LT(plan.scratch_bytes_shared, plan.scratch_bytes);
    call.ScratchLimit(plan.scratch_bytes);
    qm_packed packed = {};
    EXPECT_EQ(Quantize(call, s, p, &packed), QM_OK) << call.error();
  }
}

TEST(GptqErrors, EveryFailedAllocationIsReported) {
  Setting s;
  s.act_order = true;
  s.alpha = 0.25;
  const Problem p = MakeProblem(8, 64, 100, 11, {3});
  FakeCall good;
  Apply(s, &good);
  qm_packed packed = {};
  ASSERT_EQ(Quantize(good, s, p, &packed), QM_OK);
  for (int64_t n = 0; n < good.scratch_calls(); ++n) {
    FakeCall call;
    Apply(s, &call);
    call.FailScratchAt(n);
    EXPECT_EQ(Quantize(call, s, p, &packed), QM_RESOURCE_EXHAUSTED) << n;
    EXPECT_NE(call.error().find("no scratch memory"), std::string::npos);
  }
  for (int64_t n = 0; n < good.emit_calls(); ++n) {
    FakeCall call;
    Apply(s, &call);
    call.FailEmitAt(n);
    EXPECT_EQ(Quantize(call, s, p, &packed), QM_RESOURCE_EXHAUSTED) << n;
  }
}

TEST(GptqErrors, StopsWhenAsked) {
  Setting s;
  s.block_size = 16;
  const Problem p = MakeProblem(8, 128, 200, 12);
  for (const int64_t at : {0, 3}) {
    FakeCall call;
    Apply(s, &call);
    call.CancelAt(at);
    qm_packed packed = {};
    EXPECT_EQ(Quantize(call, s, p, &packed), QM_CANCELLED);
    EXPECT_EQ(call.progress_calls(), at + 1);
  }
}

}  // namespace
}  // namespace quantmill::gptq::testing
