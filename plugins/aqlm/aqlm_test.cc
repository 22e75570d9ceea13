// The quantizer on the CPU against brute force, and on bad input.
#include <gtest/gtest.h>

#include <limits>

#include "aqlm_testing.h"
#include "options.h"

namespace quantmill::aqlm::testing {
namespace {

std::vector<float> Weights(const Setting& s, const Problem& p, uint64_t seed = 1, int threads = 1) {
  FakeCall call;
  Apply(s, &call);
  call.Seed(seed).Threads(threads);
  qm_packed packed = {};
  EXPECT_EQ(Quantize(call, s, p, &packed), QM_OK) << call.error();
  EXPECT_TRUE(call.CanariesIntact());
  for (const float v : Floats(call, call.EmittedTensor(0, "codebooks")))
    EXPECT_TRUE(std::isfinite(v));
  return Dequantized(call, packed);
}

TEST(Aqlm, EnoughVectorsReproduceTheWeight) {
  // 8 rows of 4 groups are 32 points for 32 vectors: each has one of its own.
  const Problem p = MakeProblem(8, 16, 100, 1);
  Setting s;
  s.scheme = "1x5";
  s.dtype = QM_F32;
  EXPECT_LT(RelativeLoss(p, Weights(s, p)), 1e-10);
}

TEST(Aqlm, LossFallsWithEveryPartOfTheMethod) {
  const Problem p = MakeProblem(48, 64, 400, 2);
  Setting no_fit, one, full, beam;
  no_fit.steps = 0;
  no_fit.tolerance = 0.5;
  one.tolerance = 0.5;  // stops after two alternations
  full.tolerance = 0.001;
  beam.beam = 4;
  beam.tolerance = 0.001;
  const double start = RelativeLoss(p, Weights(no_fit, p)), few = RelativeLoss(p, Weights(one, p));
  const double more = RelativeLoss(p, Weights(full, p)), wide = RelativeLoss(p, Weights(beam, p));
  EXPECT_LT(few, start);
  EXPECT_LT(more, few);
  EXPECT_LT(wide, more);
}

// With one codebook and no correlation between groups a search ends where no single code can be
// improved: brute force over all codes of the result.
TEST(Aqlm, NoSingleCodeCanBeImproved) {
  Problem p = MakeProblem(12, 16, 200, 3);
  for (int64_t i = 0; i < p.in; ++i) {
    for (int64_t j = 0; j < p.in; ++j) {
      if (i / 4 != j / 4) p.hessian[i * p.in + j] = 0;
    }
  }
  Setting s;
  s.scheme = "1x4";
  FakeCall call;
  Apply(s, &call);
  qm_packed packed = {};
  ASSERT_EQ(Quantize(call, s, p, &packed), QM_OK) << call.error();
  std::vector<float> w = Dequantized(call, packed);
  const double reached = Loss(p, w);
  const std::vector<float> books = Floats(call, call.EmittedTensor(0, "codebooks"));
  const std::vector<float> scales = Floats(call, call.EmittedTensor(0, "scales"));
  for (int64_t o = 0; o < p.out; ++o) {
    for (int64_t j = 0; j < 4; ++j) {
      for (int c = 0; c < 16; ++c) {
        std::vector<float> other = w;
        for (int a = 0; a < 4; ++a) other[o * 16 + j * 4 + a] = scales[o] * books[c * 4 + a];
        // The damping of the Gram matrix (1e-4 of its mean) is not in this loss.
        EXPECT_GE(Loss(p, other), reached * (1 - 1e-3));
      }
    }
  }
}

TEST(Aqlm, SeedAndNothingElseDecidesTheBytes) {
  const Problem p = MakeProblem(40, 48, 200, 4);
  for (const int beam : {1, 3}) {
    Setting s;
    s.beam = beam;
    const std::vector<float> once = Weights(s, p);
    EXPECT_EQ(once, Weights(s, p));
    EXPECT_EQ(once, Weights(s, p, 1, 4));
    EXPECT_NE(once, Weights(s, p, 2));
  }
}

TEST(Aqlm, OddShapesAndSchemes) {
  for (const int64_t out : {1, 5}) {
    for (const std::string scheme : {"1x1", "3x2", "1x9", "16x1"}) {
      const Problem p = MakeProblem(out, 21, 60, 5);
      Setting s;
      s.scheme = scheme;
      s.group_size = 3;
      s.beam = out == 1 ? 2 : 1;
      EXPECT_LT(RelativeLoss(p, Weights(s, p)), 1.0) << scheme;
    }
  }
}

TEST(Aqlm, ZeroAndConstantRows) {
  Problem p = MakeProblem(16, 32, 100, 6);
  for (int64_t i = 0; i < 32; ++i) {
    p.w[3 * 32 + i] = 0;
    p.w[4 * 32 + i] = 0.25f;
  }
  const std::vector<float> w = Weights({}, p);
  for (int64_t i = 0; i < 32; ++i) EXPECT_EQ(w[3 * 32 + i], 0.0f);
  std::fill(p.w.begin(), p.w.end(), 0.0f);
  EXPECT_EQ(Weights({}, p), p.w);
  std::fill(p.w.begin(), p.w.end(), -0.5f);
  EXPECT_LT(RelativeLoss(p, Weights({}, p)), 1e-5);
}

TEST(Aqlm, OutliersKeepOtherRowsWhole) {
  Problem p = MakeProblem(16, 32, 100, 7);
  const std::vector<float> before = Weights({}, p);
  p.w[5] = 1000.0f;
  const std::vector<float> w = Weights({}, p);
  EXPECT_NEAR(w[5], 1000.0f, 100.0f);
  p.w[5] = 1e30f;  // beyond what f16 can say: cut off, and nothing else is lost
  for (const float v : Weights({}, p)) EXPECT_TRUE(std::isfinite(v));
}

TEST(Aqlm, NoRowsAndDeadInputs) {
  Problem p = MakeProblem(16, 32, 100, 8);
  Problem plain = p;
  std::fill(plain.hessian.begin(), plain.hessian.end(), 0.0f);
  for (int64_t i = 0; i < 32; ++i) plain.hessian[i * 33] = 1.0f;
  Problem none = p;
  none.rows = 0;
  EXPECT_EQ(Weights({}, none), Weights({}, [&] {
              Problem zero = p;
              std::fill(zero.hessian.begin(), zero.hessian.end(), 0.0f);
              return zero;
            }()));
  EXPECT_LT(RelativeLoss(plain, Weights({}, none)), 0.5);
  for (int64_t i = 0; i < 32; ++i) {  // input 9 is always 0
    p.hessian[9 * 32 + i] = 0;
    p.hessian[i * 32 + 9] = 0;
  }
  EXPECT_LT(RelativeLoss(p, Weights({}, p)), 0.5);
}

TEST(Aqlm, NotFiniteInputIsNamed) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Problem p = MakeProblem(8, 16, 50, 9);
    p.w[3 * 16 + 7] = bad;
    FakeCall call;
    Apply({}, &call);
    qm_packed packed = {};
    EXPECT_EQ(Quantize(call, {}, p, &packed), QM_INVALID_ARGUMENT);
    EXPECT_NE(call.error().find("row 3, column 7"), std::string::npos) << call.error();
    p = MakeProblem(8, 16, 50, 9);
    p.hessian[2 * 16 + 1] = bad;
    FakeCall other;
    Apply({}, &other);
    EXPECT_EQ(Quantize(other, {}, p, &packed), QM_INVALID_ARGUMENT);
    EXPECT_NE(other.error().find("Hessian at row 2, column 1"), std::string::npos);
  }
}

TEST(Aqlm, OptionsAreChecked) {
  const auto refused = [](const Setting& s, int64_t in, const std::string& word) {
    FakeCall call;
    Apply(s, &call);
    const qm_linear_info info = Info(16, in);
    qm_quant_plan plan = {};
    plan.struct_size = sizeof plan;
    EXPECT_EQ(Ext<qm_quantize_linear>(QM_EXT_QUANTIZE_LINEAR).plan(call.get(), &info, &plan),
              QM_INVALID_ARGUMENT);
    EXPECT_NE(call.error().find(word), std::string::npos) << call.error();
  };
  for (const char* scheme : {"", "2", "x8", "2x", "0x8", "17x8", "2x17", "2x8g8", "02x8", "2X8"}) {
    Setting s;
    s.scheme = scheme;
    refused(s, 32, "scheme");
  }
  Setting s;
  s.group_size = 5;
  refused(s, 32, "use 4, 8, 16, 32");
  s = {};
  s.scheme = "16x2";
  s.group_size = 1;
  s.beam = 16;
  refused(s, 256, "beam");
}

TEST(Aqlm, PlanKnowsSizeAndScratch) {
  const Problem p = MakeProblem(24, 48, 60, 10);
  for (const int beam : {1, 2}) {
    Setting s;
    s.beam = beam;
    FakeCall call;
    Apply(s, &call);
    const qm_linear_info info = Info(p.out, p.in);
    qm_quant_plan plan = {};
    plan.struct_size = sizeof plan;
    ASSERT_EQ(Ext<qm_quantize_linear>(QM_EXT_QUANTIZE_LINEAR).plan(call.get(), &info, &plan),
              QM_OK);
    EXPECT_STREQ(plan.format_json, R"({"codebooks":2,"group_size":4,"index_bits":4})");
    // 2 bytes per 4 weights, 2 x 16 x 4 values and 24 scales of 16 bits.
    EXPECT_DOUBLE_EQ(plan.bits_per_weight, 4.0 + 16.0 * (128 + 24) / (24.0 * 48.0));
    FakeCall run;
    Apply(s, &run);
    qm_packed packed = {};
    ASSERT_EQ(Quantize(run, s, p, &packed), QM_OK);
    EXPECT_LE(run.scratch_bytes(), plan.scratch_bytes);
  }
}

TEST(Aqlm, FailuresOfTheHostEndTheCall) {
  const Problem p = MakeProblem(16, 32, 60, 11);
  qm_packed packed = {};
  FakeCall count;
  Apply({}, &count);
  ASSERT_EQ(Quantize(count, {}, p, &packed), QM_OK);
  for (int64_t i = 0; i < count.scratch_calls(); ++i) {
    FakeCall call;
    Apply({}, &call);
    call.FailScratchAt(i);
    EXPECT_EQ(Quantize(call, {}, p, &packed), QM_RESOURCE_EXHAUSTED);
  }
  FakeCall cancelled, without;
  Apply({}, &cancelled);
  cancelled.CancelAt(3);
  EXPECT_EQ(Quantize(cancelled, {}, p, &packed), QM_CANCELLED);
  Apply({}, &without);
  without.WithoutLinalg();
  EXPECT_EQ(Quantize(without, {}, p, &packed), QM_FAILED_PRECONDITION);
}

}  // namespace
}  // namespace quantmill::aqlm::testing
