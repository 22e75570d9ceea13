// Rotations against PEFT's numbers (peft_vectors.h), against the formulas in f64, and bad input.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "oftq_test_util.h"
#include "peft_vectors.h"

namespace quantmill::oftq::testing {
namespace {

Setting Small(int64_t block, int64_t terms) {
  Setting s;
  s.in = 12;
  s.out = 5;
  s.block = block;
  s.terms = terms;
  return s;
}

std::vector<float> Scaled(std::vector<float> values, float factor) {
  for (float& x : values) x *= factor;
  return values;
}

// d W: the gradient that reaches the rotation's output.
std::vector<float> ThroughWeight(const std::vector<float>& d, const std::vector<float>& w,
                                 int64_t rows, int64_t out, int64_t in) {
  std::vector<float> result;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < in; ++i) {
      double sum = 0.0;
      for (int64_t o = 0; o < out; ++o) sum += static_cast<double>(d[r * out + o]) * w[o * in + i];
      result.push_back(static_cast<float>(sum));
    }
  }
  return result;
}

TEST(Oft, EqualsPeft) {
  const std::vector<float> w = Sequence(60, 1), x = Sequence(24, 2);
  const std::vector<float> above = ThroughWeight(Sequence(10, 4), w, 2, 5, 12);
  for (const peft_vectors::Oft& want : peft_vectors::AllOft()) {
    SCOPED_TRACE(::testing::Message() << "block " << want.block << ", terms " << want.terms);
    const Setting s = Small(want.block, want.terms);
    const Values q = {Scaled(Sequence(12 / s.block * s.numbers(), 3), 0.25f)};
    const Result got = Compute(s, x, q, above);
    ASSERT_EQ(got.code, QM_OK) << got.error;
    for (size_t i = 0; i < want.rotated.size(); ++i) EXPECT_NEAR(got.out[i], want.rotated[i], 2e-6);
    ASSERT_EQ(got.d_params[0].size(), want.gradient.size());
    for (size_t i = 0; i < want.gradient.size(); ++i) {
      EXPECT_NEAR(got.d_params[0][i], want.gradient[i], 1e-5);
    }
  }
}

TEST(Oft, ForwardEqualsTheFormula) {
  for (const int64_t block : {2, 5, 32, 64, 128}) {
    for (const int64_t terms : {0, 2, 3, 5, 9}) {
      SCOPED_TRACE(::testing::Message() << "block " << block << ", terms " << terms);
      Setting s;
      s.block = block;
      s.terms = terms;
      s.in = block == 5 ? 15 : 128;
      s.out = 3;
      const Values q = RandomParams(s, 7, 0.1f);
      const std::vector<float> x = Normal(3 * s.in, 8);
      const Result got = Compute(s, x, q, {});
      ASSERT_EQ(got.code, QM_OK) << got.error;
      const Doubles want = SlowForward(s, Widened(x), {Widened(q[0])});
      const double bound = SumTolerance(block) * Size(want);
      for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got.out[i], want[i], bound);
    }
  }
}

TEST(Oft, GradientsEqualDifferences) {
  for (const int64_t block : {2, 3, 6}) {
    for (const int64_t terms : {0, 2, 3, 4, 5, 8}) {
      SCOPED_TRACE(::testing::Message() << "block " << block << ", terms " << terms);
      const Setting s = Small(block, terms);
      const Values q = RandomParams(s, 3, 0.3f);
      const std::vector<float> x = Normal(4 * s.in, 4), above = Normal(4 * s.in, 5);
      const Result got = Compute(s, x, q, above);
      ASSERT_EQ(got.code, QM_OK) << got.error;
      const std::vector<Doubles> params = {Widened(q[0])};
      for (size_t i = 0; i < x.size(); ++i) {
        const double want = SlowDerivative(s, Widened(x), params, Widened(above), -1, i);
        EXPECT_NEAR(got.d_in[i], want, 1e-5);
      }
      const double bound = 1e-5 * (1.0 + Size(got.d_params[0]));
      for (size_t i = 0; i < q[0].size(); ++i) {
        const double want = SlowDerivative(s, Widened(x), params, Widened(above), 0, i);
        EXPECT_NEAR(got.d_params[0][i], want, bound);
      }
    }
  }
}

// || R R^T - I ||, largest element, of the rotation of one block.
double Unorthogonality(const Setting& s, const Values& q) {
  std::vector<float> unit(static_cast<size_t>(s.in * s.in), 0.0f);
  for (int64_t i = 0; i < s.in; ++i) unit[i * s.in + i] = 1.0f;
  const Result r = Compute(s, unit, q, {});
  EXPECT_EQ(r.code, QM_OK) << r.error;
  double worst = 0.0;
  for (int64_t i = 0; i < s.in; ++i) {
    for (int64_t j = 0; j < s.in; ++j) {
      double sum = i == j ? -1.0 : 0.0;
      for (int64_t k = 0; k < s.in; ++k)
        sum += static_cast<double>(r.out[i * s.in + k]) * r.out[j * s.in + k];
      worst = std::max(worst, std::fabs(sum));
    }
  }
  return worst;
}

TEST(Oft, RotationIsOrthogonal) {
  Setting s;
  s.in = s.block = 32;
  s.out = 4;
  s.terms = 0;
  // The exact transform: to rounding, however far from the identity.
  for (const float size : {0.01f, 0.3f, 3.0f}) {
    EXPECT_LT(Unorthogonality(s, RandomParams(s, 1, size)), 1e-5) << size;
  }
}

// The series with last power d is (I + Q)(I - Q)^-1 (I - Q^d): for d > 1, R R^T = I - Q^2d for odd
// d, (I - Q^d)^2 for even d. A block of two with number t has Q^2 = -t^2 I.
TEST(Oft, SeriesMissesOrthogonalityByItsLastPower) {
  Setting s;
  s.in = s.block = 2;
  s.out = 4;
  const float t = 0.5f;
  const std::pair<int64_t, double> kCases[] = {{2, 4 * std::pow(t, 2)},
                                               {4, std::pow(t, 6)},
                                               {5, 1 - std::pow(1 - std::pow(t, 4), 2)},
                                               {6, std::pow(t, 10)},
                                               {7, std::pow(1 + std::pow(t, 6), 2) - 1}};
  for (const auto& [terms, error] : kCases) {
    s.terms = terms;
    EXPECT_NEAR(Unorthogonality(s, {{t}}), error, 1e-6) << terms;
  }
}

TEST(Oft, SeriesAndExactTurnInOppositeDirections) {
  Setting s = Small(4, 40);
  const Values q = {Scaled(Sequence(18, 3), 0.1f)};
  const std::vector<float> x = Normal(12, 2);
  const Result there = Compute(s, x, q, {});
  s.terms = 0;
  const Result back = Compute(s, there.out, q, {});
  ASSERT_EQ(back.code, QM_OK) << back.error;
  for (size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(back.out[i], x[i], 1e-5);
}

TEST(Oft, FreshParametersLeaveXAsItIs) {
  for (const int64_t terms : {0, 5}) {
    Setting s = Small(4, terms);
    FakeCall call;
    Apply(s, &call);
    const Linear linear(s);
    auto params = ParamTensors(s, {std::vector<float>(18, 9.0f)}, &call);
    ASSERT_EQ(Table().init(call.get(), &linear.info, nullptr, nullptr, params.data(), 1), QM_OK)
        << call.error();
    const std::vector<float> q = call.Read<float>(params[0].tensor);
    EXPECT_EQ(q, std::vector<float>(18, 0.0f));
    const std::vector<float> x = Normal(24, 1);
    EXPECT_EQ(Compute(s, x, {q}, {}).out, x);
  }
}

TEST(Oft, SixteenBitInputsAreRoundedOnce) {
  Setting s;
  s.in = 64;
  s.out = 4;
  const Values q = RandomParams(s, 7, 0.1f);
  std::vector<qm::BF16> narrow;
  std::vector<qm::F16> half;
  std::vector<float> x, x_half;
  for (const float value : Normal(3 * s.in, 8)) {
    narrow.push_back(qm::ToBF16(value));
    x.push_back(qm::ToFloat(narrow.back()));
    half.push_back(qm::ToF16(value));
    x_half.push_back(qm::ToFloat(half.back()));
  }
  const std::vector<float> above = Normal(3 * s.in, 9);
  const Result got = Compute(s, narrow, q, above), want = Compute(s, x, q, above);
  ASSERT_EQ(got.code, QM_OK) << got.error;
  for (size_t i = 0; i < x.size(); ++i) {
    EXPECT_EQ(got.out[i], qm::ToFloat(qm::ToBF16(want.out[i])));
  }
  EXPECT_EQ(got.d_params, want.d_params);
  EXPECT_EQ(got.d_in, want.d_in);
  const Result got_half = Compute(s, half, q, {}), want_half = Compute(s, x_half, q, {});
  for (size_t i = 0; i < x.size(); ++i) {
    EXPECT_EQ(got_half.out[i], qm::ToFloat(qm::ToF16(want_half.out[i])));
  }
}

TEST(Oft, ThreadsDoNotChangeTheResult) {
  Setting s;
  s.in = 96;
  s.out = 4;
  const Values q = RandomParams(s, 7, 0.1f);
  const std::vector<float> x = Normal(37 * s.in, 8), above = Normal(37 * s.in, 9);
  const Result one = Compute(s, x, q, above), four = Compute(s, x, q, above, {QM_CPU, 0}, 4);
  EXPECT_EQ(one.out, four.out);
  EXPECT_EQ(one.d_in, four.d_in);
  EXPECT_EQ(one.d_params, four.d_params);
  const Result none = Compute(s, x, q, above, {QM_CPU, 0}, 0);
  EXPECT_EQ(one.d_params, none.d_params);
}

TEST(Oft, GradientsAreAddedToWhatIsThere) {
  const Setting s = Small(4, 5);
  const Values q = RandomParams(s, 3, 0.2f);
  const std::vector<float> x = Normal(24, 4), above = Normal(24, 5);
  const Result zero = Compute(s, x, q, above), one = Compute(s, x, q, above, {QM_CPU, 0}, 1, 1.0f);
  for (size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(one.d_in[i], zero.d_in[i] + 1.0f, 1e-6);
  for (size_t i = 0; i < q[0].size(); ++i) {
    EXPECT_NEAR(one.d_params[0][i], zero.d_params[0][i] + 1.0f, 2e-6);
  }
}

TEST(Oft, NoRowsGiveNothing) {
  const Setting s = Small(4, 5);
  const Values q = RandomParams(s, 3, 0.2f);
  FakeCall call;
  Apply(s, &call);
  const Linear linear(s);
  const qm_tensor in = call.Tensor(std::vector<float>(), {0, s.in});
  qm_tensor out = in;
  const auto params = ParamTensors(s, q, &call);
  EXPECT_EQ(Table().forward(call.get(), &linear.info, &in, params.data(), 1, nullptr, &out), QM_OK);
}

// ---- finalize ----------------------------------------------------------------------------------

TEST(Oft, MergedWeightActsAsForward) {
  for (const int64_t terms : {0, 5}) {
    Setting s;
    s.in = 96;
    s.out = 7;
    s.terms = terms;
    const Values q = RandomParams(s, 7, 0.1f);
    const std::vector<float> w = Normal(s.out * s.in, 1, 0.05f), x = Normal(3 * s.in, 2);
    FakeCall call;
    Apply(s, &call);
    const Linear linear(s);
    const qm_tensor weight = call.Tensor(w, {s.out, s.in});
    const auto params = ParamTensors(s, q, &call);
    qm_packed packed = {};
    ASSERT_EQ(Table().finalize(call.get(), &linear.info, &weight, params.data(), 1, &packed), QM_OK)
        << call.error();
    const std::vector<float> merged = call.Read<float>(0, "weight");
    const Result rotated = Compute(s, x, q, {});
    for (int64_t r = 0; r < 3; ++r) {
      for (int64_t o = 0; o < s.out; ++o) {
        double want = 0.0, got = 0.0;
        for (int64_t i = 0; i < s.in; ++i) {
          want += static_cast<double>(rotated.out[r * s.in + i]) * w[o * s.in + i];
          got += static_cast<double>(x[r * s.in + i]) * merged[o * s.in + i];
        }
        EXPECT_NEAR(got, want, SumTolerance(s.in) * 0.05 * std::sqrt(static_cast<double>(s.in)));
      }
    }
  }
}

TEST(Oft, BadParametersAreNotMerged) {
  const Setting s = Small(4, 5);
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Values q = RandomParams(s, 7, 0.1f);
    q[0][8] = bad;  // row 1, column 2 of [3, 6]
    FakeCall call;
    Apply(s, &call);
    const Linear linear(s);
    const qm_tensor weight = call.Tensor(Normal(60, 1), {s.out, s.in});
    const auto params = ParamTensors(s, q, &call);
    qm_packed packed = {};
    EXPECT_EQ(Table().finalize(call.get(), &linear.info, &weight, params.data(), 1, &packed),
              QM_INVALID_ARGUMENT);
    EXPECT_NE(call.error().find("'oft_R' has a value at [1, 2]"), std::string::npos)
        << call.error();
  }
}

// ---- plan and bad input ------------------------------------------------------------------------

struct Planned {
  qm_status code = QM_OK;
  std::string error, log;
  qm_reparam_plan plan = {};
  std::string name;
  std::vector<int64_t> shape;
};

Planned Plan(const Setting& s, const std::string& merge = "false") {
  FakeCall call;
  Apply(s, &call);
  call.Set("merge", merge);
  const Linear linear(s);
  Planned out;
  out.plan.struct_size = sizeof out.plan;
  out.code = Table().plan(call.get(), &linear.info, &out.plan);
  out.error = call.error();
  for (const auto& line : call.logs()) out.log += line.second;
  if (out.code == QM_OK) {
    out.name = out.plan.params[0].name;
    out.shape.assign(out.plan.params[0].shape, out.plan.params[0].shape + 2);
  }
  return out;
}

TEST(OftPlan, SaysParameters) {
  Setting s;
  s.in = 4096;
  s.out = 1024;
  const Planned planned = Plan(s);
  ASSERT_EQ(planned.code, QM_OK) << planned.error;
  EXPECT_EQ(planned.name, "oft_R");
  EXPECT_EQ(planned.shape, (std::vector<int64_t>{128, 496}));
  EXPECT_EQ(planned.plan.kind, QM_REPARAM_INPUT);
  EXPECT_EQ(planned.plan.flags, 0u);
  EXPECT_EQ(planned.plan.saved_bytes_fixed, 4096u * 32 * 4);
  EXPECT_EQ(planned.log, "");
  EXPECT_EQ(Plan(s, "true").plan.flags, QM_REPARAM_FOLD);
}

// peft 0.21.2: OFTLayer.adjust_oft_parameters.
TEST(OftPlan, TakesTheDivisorThatPeftTakes) {
  const int64_t kCases[][3] = {{96, 32, 32},  {100, 32, 25}, {48, 20, 16},  {60, 8, 6},
                               {64, 128, 64}, {42, 40, 42},  {100, 22, 20}, {100, 23, 25}};
  for (const auto& [in, asked, block] : kCases) {
    Setting s;
    s.in = in;
    s.out = 8;
    s.block = asked;
    const Planned planned = Plan(s);
    ASSERT_EQ(planned.code, QM_OK) << planned.error;
    EXPECT_EQ(planned.shape, (std::vector<int64_t>{in / block, block * (block - 1) / 2}))
        << in << " " << asked;
    EXPECT_EQ(planned.log.empty(), asked == block);
  }
}

TEST(OftPlan, RefusesWhatCannotRotate) {
  Setting s;
  s.out = 8;
  s.in = 131;  // a prime: the nearest divisors of 2 are 1 and 131
  s.block = 2;
  Planned planned = Plan(s);
  EXPECT_EQ(planned.code, QM_INVALID_ARGUMENT);
  EXPECT_NE(planned.error.find("does not divide 131"), std::string::npos) << planned.error;
  s.in = 64;
  for (const int64_t block : {0, 1, -4, 129}) {
    s.block = block;
    EXPECT_EQ(Plan(s).code, QM_INVALID_ARGUMENT) << block;
  }
  s.block = 32;
  for (const int64_t terms : {-1, 1, 65}) {
    s.terms = terms;
    EXPECT_EQ(Plan(s).code, QM_INVALID_ARGUMENT) << terms;
  }
  s.terms = 5;
  s.method = "dora";
  EXPECT_EQ(Plan(s).code, QM_INVALID_ARGUMENT);
  s.method = "oft";
  s.in = 0;
  EXPECT_EQ(Plan(s).code, QM_INVALID_ARGUMENT);
}

TEST(OftPlan, TargetNamesLinears) {  // model.layers.0.self_attn.q_proj
  Setting s;
  s.in = s.out = 64;
  for (const char* target : {"*", "q_proj", "k_proj, q_proj", "?_proj", "model.layers.0.*",
                             "*.self_attn.*", "k_proj,,*q*", "*_proj"}) {
    s.target = target;
    EXPECT_EQ(Plan(s).code, QM_OK) << target;
  }
  for (const char* target :
       {"k_proj", "q", "self_attn", "?proj", "model.layers.1.*", "q_proj.", ","}) {
    s.target = target;
    EXPECT_EQ(Plan(s).code, QM_UNIMPLEMENTED) << target;
  }
  s.target = " ";
  EXPECT_EQ(Plan(s).code, QM_INVALID_ARGUMENT);
}

class OftBadInput : public ::testing::Test {
 protected:
  OftBadInput() : s_(Small(4, 5)), linear_(s_) {
    Apply(s_, &call_);
    in_ = call_.Tensor(Normal(24, 1), {2, 12});
    out_ = call_.Tensor(Normal(24, 1), {2, 12});
    params_ = ParamTensors(s_, RandomParams(s_, 7, 0.1f), &call_);
    saved_ = call_.Tensor(std::vector<float>(48), {48});
  }
  qm_status Forward() {
    return Table().forward(call_.get(), &linear_.info, &in_, params_.data(), params_.size(),
                           saved_.data, &out_);
  }
  Setting s_;
  Linear linear_;
  FakeCall call_;
  qm_tensor in_, out_, saved_;
  std::vector<qm_named_tensor> params_;
};

TEST_F(OftBadInput, ShapesAndTypesOfTensors) {
  EXPECT_EQ(Forward(), QM_OK) << call_.error();
  const qm_tensor in = in_;
  in_.shape[1] = 11;
  EXPECT_EQ(Forward(), QM_INVALID_ARGUMENT);
  in_ = in;
  in_.dtype = QM_I32;
  EXPECT_EQ(Forward(), QM_INVALID_ARGUMENT);
  in_ = in;
  in_.dtype = QM_F16;  // the result is f32
  EXPECT_EQ(Forward(), QM_INVALID_ARGUMENT);
  in_ = in;
  in_.stride[0] = 13;
  EXPECT_EQ(Forward(), QM_INVALID_ARGUMENT);
  in_ = in;
  in_.device = {QM_CUDA, 0};
  EXPECT_EQ(Forward(), QM_INVALID_ARGUMENT);
  in_ = in;
  out_.shape[0] = 3;
  EXPECT_EQ(Forward(), QM_INVALID_ARGUMENT);
}

TEST_F(OftBadInput, Parameters) {
  params_[0].tensor.shape[0] = 4;
  EXPECT_EQ(Forward(), QM_INVALID_ARGUMENT);
  EXPECT_NE(call_.error().find("expected [3, 6]"), std::string::npos) << call_.error();
  params_[0].tensor.shape[0] = 3;
  params_[0].tensor.dtype = QM_BF16;
  EXPECT_EQ(Forward(), QM_INVALID_ARGUMENT);
  params_[0].tensor.dtype = QM_F32;
  params_[0].name = "oft_Q";
  EXPECT_EQ(Forward(), QM_INVALID_ARGUMENT);
  params_.clear();
  EXPECT_EQ(Forward(), QM_INVALID_ARGUMENT);
}

TEST_F(OftBadInput, VjpWithoutSaved) {
  EXPECT_EQ(Table().vjp(call_.get(), &linear_.info, &in_, params_.data(), 1, nullptr, &out_,
                        nullptr, params_.data()),
            QM_INVALID_ARGUMENT);
}

TEST_F(OftBadInput, NoScratchMemory) {
  saved_.data = nullptr;
  call_.FailScratchAt(0);
  EXPECT_EQ(Forward(), QM_RESOURCE_EXHAUSTED);
}

TEST(Oft, ScratchKeepsToThePlan) {
  Setting s;
  s.in = 256;
  s.out = 48;
  const Planned planned = Plan(s);
  FakeCall call;
  Apply(s, &call);
  const Linear linear(s);
  const qm_tensor weight = call.Tensor(Normal(s.out * s.in, 1), {s.out, s.in});
  const auto params = ParamTensors(s, RandomParams(s, 7, 0.1f), &call);
  qm_packed packed = {};
  ASSERT_EQ(Table().finalize(call.get(), &linear.info, &weight, params.data(), 1, &packed), QM_OK);
  EXPECT_LE(call.scratch_bytes(), planned.plan.scratch_bytes);
}

}  // namespace
}  // namespace quantmill::oftq::testing
