// LoRA against PEFT's numbers (peft_vectors.h), against the formulas in f64, and bad input.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "oftq_test_util.h"
#include "peft_vectors.h"

namespace quantmill::oftq::testing {
namespace {

Setting Make(int64_t in, int64_t out, int64_t rank, double alpha) {
  Setting s;
  s.method = "lora";
  s.in = in;
  s.out = out;
  s.rank = rank;
  s.alpha = alpha;
  return s;
}

void ExpectNear(const std::vector<float>& got, const std::vector<float>& want, double bound) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i], want[i], bound) << i;
}

TEST(Lora, EqualsPeft) {
  const Setting s = Make(12, 5, 3, 6.0);
  const Result got =
      Compute(s, Sequence(24, 2), {Sequence(36, 3), Sequence(15, 4)}, Sequence(10, 5));
  ASSERT_EQ(got.code, QM_OK) << got.error;
  ExpectNear(got.out, peft_vectors::kLoraAddition, 4e-6);  // a difference of two outputs there
  ExpectNear(got.d_params[0], peft_vectors::kLoraGradientA, 4e-6);
  ExpectNear(got.d_params[1], peft_vectors::kLoraGradientB, 4e-6);
}

TEST(Lora, ForwardAndGradientsEqualTheFormula) {
  // More columns than a tile, rows that do not fill one.
  for (const Setting& s : {Make(12, 5, 3, 16.0), Make(7, 300, 1, -2.0), Make(300, 4, 20, 0.5)}) {
    SCOPED_TRACE(::testing::Message() << s.in << " to " << s.out << ", rank " << s.rank);
    const int64_t rows = 19;
    const Values params = RandomParams(s, 7, 0.3f);
    const std::vector<float> x = Normal(rows * s.in, 8), above = Normal(rows * s.out, 9);
    const Result got = Compute(s, x, params, above);
    ASSERT_EQ(got.code, QM_OK) << got.error;
    const std::vector<Doubles> theta = {Widened(params[0]), Widened(params[1])};
    const Doubles want = SlowForward(s, Widened(x), theta);
    for (size_t i = 0; i < want.size(); ++i) {
      EXPECT_NEAR(got.out[i], want[i], SumTolerance(s.in + s.rank) * Size(want));
    }
    const auto expect_derivatives = [&](const std::vector<float>& seen, int which) {
      const double bound = 1e-5 * (1.0 + Size(seen));
      for (size_t i = 0; i < seen.size(); i += 1 + seen.size() / 40) {
        const double slope = SlowDerivative(s, Widened(x), theta, Widened(above), which, i);
        EXPECT_NEAR(seen[i], slope, bound) << which << " " << i;
      }
    };
    expect_derivatives(got.d_in, -1);
    expect_derivatives(got.d_params[0], 0);
    expect_derivatives(got.d_params[1], 1);
  }
}

TEST(Lora, ManyRowsAreTakenInPieces) {
  const Setting s = Make(3, 2, 1, 1.0);
  const int64_t rows = 20001;
  const Values params = RandomParams(s, 7, 1.0f);
  const std::vector<float> x = Normal(rows * s.in, 8), above = Normal(rows * s.out, 9);
  const Result got = Compute(s, x, params, above);
  ASSERT_EQ(got.code, QM_OK) << got.error;
  const Doubles want = SlowForward(s, Widened(x), {Widened(params[0]), Widened(params[1])});
  for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got.out[i], want[i], 1e-5);
  EXPECT_EQ(Compute(s, x, params, {}).out, got.out);  // nothing is saved
  for (int which = -1; which < 2; ++which) {
    const std::vector<float>& seen = which < 0 ? got.d_in : got.d_params[which];
    const size_t last = seen.size() - 1;
    const double slope = SlowDerivative(s, Widened(x), {Widened(params[0]), Widened(params[1])},
                                        Widened(above), which, last);
    EXPECT_NEAR(seen[last], slope, 2e-5 * (1.0 + Size(seen))) << which;
  }
}

TEST(Lora, SixteenBitInputs) {
  const Setting s = Make(40, 24, 4, 8.0);
  const Values params = RandomParams(s, 7, 0.3f);
  std::vector<qm::F16> half;
  std::vector<float> x;
  for (const float value : Normal(5 * s.in, 8)) {
    half.push_back(qm::ToF16(value));
    x.push_back(qm::ToFloat(half.back()));
  }
  const std::vector<float> above = Normal(5 * s.out, 9);
  const Result got = Compute(s, half, params, above), want = Compute(s, x, params, above);
  ASSERT_EQ(got.code, QM_OK) << got.error;
  for (size_t i = 0; i < want.out.size(); ++i) {
    EXPECT_EQ(got.out[i], qm::ToFloat(qm::ToF16(want.out[i])));
  }
  EXPECT_EQ(got.d_params, want.d_params);
}

TEST(Lora, ThreadsDoNotChangeTheResult) {
  const Setting s = Make(520, 270, 8, 16.0);
  const Values params = RandomParams(s, 7, 0.1f);
  const std::vector<float> x = Normal(37 * s.in, 8), above = Normal(37 * s.out, 9);
  const Result one = Compute(s, x, params, above),
               four = Compute(s, x, params, above, {QM_CPU, 0}, 4);
  EXPECT_EQ(one.out, four.out);
  EXPECT_EQ(one.d_in, four.d_in);
  EXPECT_EQ(one.d_params, four.d_params);
}

std::vector<std::vector<float>> Fresh(const Setting& s, uint64_t seed) {
  FakeCall call;
  Apply(s, &call);
  call.Seed(seed);
  const Linear linear(s);
  auto params = ParamTensors(
      s, {std::vector<float>(s.rank * s.in, 9.0f), std::vector<float>(s.out * s.rank, 9.0f)},
      &call);
  EXPECT_EQ(Table().init(call.get(), &linear.info, nullptr, nullptr, params.data(), 2), QM_OK)
      << call.error();
  return {call.Read<float>(params[0].tensor), call.Read<float>(params[1].tensor)};
}

// Uniform in +-1 / sqrt(in): variance 1 / (3 in).
TEST(Lora, StartsAsKaimingUniformAndZero) {
  const Setting s = Make(400, 6, 50, 16.0);
  const auto fresh = Fresh(s, 5);
  EXPECT_EQ(fresh[1], std::vector<float>(300, 0.0f));
  const double bound = 1.0 / 20.0;
  double mean = 0.0;
  for (const float x : fresh[0]) {
    EXPECT_LE(std::fabs(x), bound);
    mean += x / 20000.0;
  }
  EXPECT_NEAR(mean, 0.0, 5.0 * bound / std::sqrt(3.0 * 20000.0));
  EXPECT_NEAR(Size(fresh[0]), bound / std::sqrt(3.0), 0.02 * bound);
  EXPECT_GT(*std::max_element(fresh[0].begin(), fresh[0].end()), 0.99 * bound);
  EXPECT_LT(*std::min_element(fresh[0].begin(), fresh[0].end()), -0.99 * bound);
  EXPECT_EQ(Fresh(s, 5), fresh);
  EXPECT_NE(Fresh(s, 6), fresh);
  const Result at_start = Compute(s, Normal(800, 1), fresh, {});
  EXPECT_EQ(at_start.out, std::vector<float>(12, 0.0f));
}

qm_status Finalize(const Setting& s, const Values& params, const std::vector<float>& w,
                   FakeCall* call) {
  Apply(s, call);
  const Linear linear(s);
  const qm_tensor weight = call->Tensor(w, {s.out, s.in});
  const auto theta = ParamTensors(s, params, call);
  qm_packed packed = {};
  return Table().finalize(call->get(), &linear.info, &weight, theta.data(), theta.size(), &packed);
}

TEST(Lora, MergedWeightIsTheSum) {
  const Setting s = Make(30, 17, 4, 6.0);
  const Values params = RandomParams(s, 7, 0.3f);
  const std::vector<float> w = Normal(s.out * s.in, 1);
  FakeCall call;
  ASSERT_EQ(Finalize(s, params, w, &call), QM_OK) << call.error();
  const std::vector<float> merged = call.Read<float>(0, "weight");
  for (int64_t o = 0; o < s.out; ++o) {
    for (int64_t i = 0; i < s.in; ++i) {
      double want = w[o * s.in + i];
      for (int64_t k = 0; k < s.rank; ++k) {
        want += 1.5 * params[1][o * s.rank + k] * params[0][k * s.in + i];
      }
      EXPECT_NEAR(merged[o * s.in + i], want, 1e-6);
    }
  }
}

TEST(Lora, BadParametersAreNotMerged) {
  const Setting s = Make(6, 5, 2, 4.0);
  Values params = RandomParams(s, 7, 0.3f);
  params[1][3] = std::numeric_limits<float>::quiet_NaN();
  FakeCall call;
  EXPECT_EQ(Finalize(s, params, Normal(30, 1), &call), QM_INVALID_ARGUMENT);
  EXPECT_NE(call.error().find("'lora_B' has a value at [1, 1]"), std::string::npos) << call.error();
}

TEST(LoraPlan, SaysParametersOrRefuses) {
  Setting s = Make(64, 48, 8, 16.0);
  const auto plan = [&](qm_reparam_plan* out, FakeCall* call) {
    Apply(s, call);
    const Linear linear(s);
    out->struct_size = sizeof *out;
    return Table().plan(call->get(), &linear.info, out);
  };
  {
    FakeCall call;
    qm_reparam_plan out = {};
    ASSERT_EQ(plan(&out, &call), QM_OK) << call.error();
    ASSERT_EQ(out.param_count, 2u);
    EXPECT_STREQ(out.params[0].name, "lora_A");
    EXPECT_STREQ(out.params[1].name, "lora_B");
    EXPECT_EQ(out.params[0].shape[0], 8);
    EXPECT_EQ(out.params[0].shape[1], 64);
    EXPECT_EQ(out.params[1].shape[0], 48);
    EXPECT_EQ(out.params[1].shape[1], 8);
    EXPECT_EQ(out.kind, QM_REPARAM_DELTA);
    EXPECT_EQ(out.saved_bytes_per_row, 32u);
  }
  for (const int64_t rank : {0, -1, 5000}) {
    s.rank = rank;
    FakeCall call;
    qm_reparam_plan out = {};
    EXPECT_EQ(plan(&out, &call), QM_INVALID_ARGUMENT);
  }
  FakeCall call;
  s.rank = 8;
  Apply(s, &call);
  call.Set("alpha", "nan");
  const Linear linear(s);
  qm_reparam_plan out = {};
  out.struct_size = sizeof out;
  EXPECT_EQ(Table().plan(call.get(), &linear.info, &out), QM_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace quantmill::oftq::testing
