// forward, vjp and finalize of qat against the formulas of README.md written out slowly.
#include <gtest/gtest.h>

#include <limits>
#include <tuple>

#include "qat_test_util.h"

namespace quantmill::qat::testing {
namespace {

class QatSettings : public ::testing::TestWithParam<std::tuple<int, int64_t, bool, qm_dtype>> {
 protected:
  Setting Make() const {
    Setting s;
    std::tie(s.bits, s.group_size, s.symmetric, s.scale_dtype) = GetParam();
    return s;
  }
};

// Spread so that about a quarter of the weights leave the grid of 15 steps of 0.02.
std::vector<float> Weights(const Setting& s, uint32_t seed) {
  return Normal(s.rows * s.cols, seed, 0.01f * s.max_code());
}

TEST_P(QatSettings, ForwardIsTheFormula) {
  const Setting s = Make();
  const std::vector<float> w = Weights(s, 1);
  const State state = Trained(s, 10);
  FakeCall call;
  Apply(s, &call);
  std::vector<float> got;
  std::vector<qm::F16> half;
  std::vector<qm::BF16> brain;
  ASSERT_EQ(Forward(call, s, w, state, &got), QM_OK) << call.error();
  ASSERT_EQ(Forward(call, s, w, state, &half), QM_OK) << call.error();
  ASSERT_EQ(Forward(call, s, w, state, &brain), QM_OK) << call.error();
  for (size_t i = 0; i < w.size(); ++i) {
    const SlowCell cell = Slow(s, state, static_cast<int64_t>(i) / s.width(), w[i]);
    ASSERT_EQ(got[i], static_cast<float>(cell.scale * (cell.code - cell.zero))) << i;
    ASSERT_EQ(half[i].bits, qm::ToF16(got[i]).bits) << i;
    ASSERT_EQ(brain[i].bits, qm::ToBF16(got[i]).bits) << i;
  }
  EXPECT_TRUE(call.CanariesIntact());
}

TEST_P(QatSettings, VjpIsTheTable) {
  const Setting s = Make();
  const std::vector<float> w = Weights(s, 2), above = Normal(s.rows * s.cols, 3, 1.0f);
  const State state = Trained(s, 20);
  FakeCall call;
  Apply(s, &call);
  constexpr float kStart = 0.5f;
  Slopes got;
  ASSERT_EQ(Vjp(call, s, w, state, above, kStart, &got), QM_OK) << call.error();
  int64_t outside = 0;
  for (int64_t index = 0; index < s.all_groups(); ++index) {
    double scale = 0, zero = 0, scale_size = 0, zero_size = 0;
    for (int64_t i = index * s.width(); i < (index + 1) * s.width(); ++i) {
      const size_t at = static_cast<size_t>(i);
      const SlowCell cell = Slow(s, state, index, w[at]);
      const double g = above[at];
      outside += cell.inside ? 0 : 1;
      ASSERT_EQ(got.weight[at], cell.inside ? above[at] + kStart : kStart) << i;
      const double steps =
          cell.inside ? std::nearbyint(cell.quotient) - cell.quotient : cell.code - cell.zero;
      scale += g * steps;
      scale_size += std::fabs(g) * (std::fabs(cell.quotient) + std::fabs(cell.code - cell.zero));
      zero += cell.inside ? 0.0 : -cell.scale * g;
      zero_size += std::fabs(cell.scale * g);
    }
    // A sum of n terms in f32, each rounded, is off by less than (n + 4) eps times their sizes.
    const double eps = static_cast<double>(s.width() + 4) * 0x1p-24;
    const size_t at = static_cast<size_t>(index);
    const double init = state.scale_init[at];
    EXPECT_NEAR(got.params.factor[at], kStart + init * scale,
                eps * (init * scale_size + kStart + std::fabs(init * scale)));
    if (s.symmetric) continue;
    EXPECT_NEAR(got.params.zero[at], kStart + zero, eps * (zero_size + kStart));
  }
  EXPECT_GT(outside, s.rows * s.cols / 20);
  EXPECT_LT(outside, s.rows * s.cols * 19 / 20);
  EXPECT_TRUE(call.CanariesIntact());
}

TEST_P(QatSettings, FinalizePacksWhatForwardGives) {
  const Setting s = Make();
  const std::vector<float> w = Weights(s, 4);
  const State state = Trained(s, 30);
  FakeCall call;
  Apply(s, &call);
  std::vector<float> want;
  ASSERT_EQ(Forward(call, s, w, state, &want), QM_OK) << call.error();
  qm_packed packed = {};
  ASSERT_EQ(Finalize(call, s, w, state, &packed), QM_OK) << call.error();
  EXPECT_STREQ(packed.format_id, "qm.fmt.affine-int/1");
  EXPECT_EQ(packed.format_json, "{\"bits\":" + std::to_string(s.bits) +
                                    ",\"group_size\":" + std::to_string(s.group_size) +
                                    ",\"zero\":\"" + (s.symmetric ? "none" : "int") + "\"}");
  EXPECT_EQ(call.EmittedTensor(0, "scale").dtype, s.scale_dtype);
  EXPECT_EQ(call.Emitted(0, "zero"), !s.symmetric);
  const std::vector<double> got = qm::testing::ReadAffine(call, packed, s.bits).Values();
  for (size_t i = 0; i < w.size(); ++i) ASSERT_EQ(static_cast<float>(got[i]), want[i]) << i;
  EXPECT_TRUE(call.CanariesIntact());
}

INSTANTIATE_TEST_SUITE_P(All, QatSettings,
                         ::testing::Combine(::testing::Values(2, 3, 4, 8),
                                            ::testing::Values<int64_t>(128, -1, 24, 1),
                                            ::testing::Bool(),
                                            ::testing::Values(QM_F16, QM_BF16, QM_F32)));

// A scale in f32 and a zero point far from its ends: inside a clipped range w_eff is s (q - z) with
// q fixed, so there the table is the derivative.
TEST(Qat, OutsideTheGridVjpIsTheDerivative) {
  Setting s;
  s.scale_dtype = QM_F32;
  s.rows = 2, s.cols = 128;
  State state = {{1.0f, 1.1f}, {3.0f, 9.0f}, {0.02f, 0.03f}};
  std::vector<float> w(256);
  for (size_t i = 0; i < w.size(); ++i) w[i] = i % 3 == 0 ? 5.0f : -5.0f;
  const std::vector<float> above = Normal(256, 5, 1.0f);
  FakeCall call;
  Apply(s, &call);
  Slopes got;
  ASSERT_EQ(Vjp(call, s, w, state, above, 0.0f, &got), QM_OK);
  constexpr float kStep = 1.0f / 64;
  for (size_t row = 0; row < 2; ++row) {
    double loss[2] = {};
    for (const int side : {0, 1}) {
      State moved = state;
      moved.factor[row] += side == 0 ? kStep : -kStep;
      std::vector<float> out;
      ASSERT_EQ(Forward(call, s, w, moved, &out), QM_OK);
      for (size_t i = 0; i < out.size(); ++i) loss[side] += static_cast<double>(above[i]) * out[i];
    }
    const double want = (loss[0] - loss[1]) / (2 * kStep);
    EXPECT_NEAR(got.params.factor[row], want, 1e-4 * std::fabs(want) + 1e-4);
    // A whole zero point more moves every clipped weight by -s.
    State moved = state;
    moved.zero[row] += 1.0f;
    std::vector<float> before, after;
    ASSERT_EQ(Forward(call, s, w, state, &before), QM_OK);
    ASSERT_EQ(Forward(call, s, w, moved, &after), QM_OK);
    double change = 0;
    for (size_t i = 0; i < after.size(); ++i) {
      change += static_cast<double>(above[i]) * (static_cast<double>(after[i]) - before[i]);
    }
    EXPECT_NEAR(got.params.zero[row], change, 1e-4);
  }
}

TEST(Qat, OnlyWantedGradientsAreWritten) {
  Setting s;
  const std::vector<float> w = Weights(s, 6), above = Normal(s.rows * s.cols, 7, 1.0f);
  const State state = Trained(s, 40);
  FakeCall call;
  Apply(s, &call);
  Slopes all;
  ASSERT_EQ(Vjp(call, s, w, state, above, 0.0f, &all), QM_OK);
  const Linear linear(s);
  const qm_tensor in = call.Tensor(w, {s.rows, s.cols});
  const qm_tensor d_out = call.Tensor(above, {s.rows, s.cols});
  const std::vector<qm_named_tensor> params = Tensors(call, s, state);
  for (const bool want_factor : {true, false}) {
    std::vector<qm_named_tensor> d_params = Tensors(call, s, Filled(s, 0.0f));
    const qm_tensor zero = d_params[1].tensor, factor = d_params[0].tensor;
    d_params[want_factor ? 1 : 0].tensor.data = nullptr;
    d_params[2].tensor.data = nullptr;
    ASSERT_EQ(Table().vjp(call.get(), &linear.info, &in, params.data(), params.size(), nullptr,
                          &d_out, nullptr, d_params.data()),
              QM_OK)
        << call.error();
    const std::vector<float> none(all.params.zero.size());
    EXPECT_EQ(call.Read<float>(factor), want_factor ? all.params.factor : none);
    EXPECT_EQ(call.Read<float>(zero), want_factor ? none : all.params.zero);
  }
}

TEST(Qat, ThreadsDoNotChangeTheBytes) {
  for (const int64_t group_size : {64, -1}) {
    Setting s;
    s.group_size = group_size;
    s.rows = 70, s.cols = 1152;
    const std::vector<float> w = Weights(s, 8), above = Normal(s.rows * s.cols, 9, 1.0f);
    const State state = Trained(s, 50);
    std::vector<Slopes> slopes;
    std::vector<std::vector<float>> results;
    std::vector<std::vector<int32_t>> codes;
    std::vector<State> starts;
    for (const int threads : {0, 1, 3}) {
      FakeCall call;
      call.Threads(threads);
      Apply(s, &call);
      slopes.emplace_back(), results.emplace_back(), starts.emplace_back();
      ASSERT_EQ(Forward(call, s, w, state, &results.back()), QM_OK);
      ASSERT_EQ(Vjp(call, s, w, state, above, 0.0f, &slopes.back()), QM_OK);
      ASSERT_EQ(Init(call, Linear(s), s, w, &starts.back()), QM_OK);
      qm_packed packed = {};
      ASSERT_EQ(Finalize(call, s, w, state, &packed), QM_OK);
      codes.push_back(call.Read<int32_t>(0, "codes"));
      EXPECT_EQ(results.back(), results[0]);
      EXPECT_EQ(codes.back(), codes[0]);
      EXPECT_EQ(slopes.back().weight, slopes[0].weight);
      EXPECT_EQ(slopes.back().params.factor, slopes[0].params.factor);
      EXPECT_EQ(slopes.back().params.zero, slopes[0].params.zero);
      EXPECT_EQ(starts.back().scale_init, starts[0].scale_init);
    }
  }
}

TEST(Qat, TrainedValuesThatAreNotFiniteAreNamed) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  Setting s;
  const std::vector<float> w = Weights(s, 11);
  const State state = Trained(s, 60);
  const auto error = [&](const std::vector<float>& weight, const State& params) {
    FakeCall call;
    call.Threads(2);
    Apply(s, &call);
    qm_packed packed = {};
    EXPECT_EQ(Finalize(call, s, weight, params, &packed), QM_INVALID_ARGUMENT);
    return call.error();
  };
  std::vector<float> bad = w;
  bad[4 * 384 + 7] = kNan;
  bad[5 * 384 + 1] = std::numeric_limits<float>::infinity();
  EXPECT_NE(error(bad, state).find("weight at row 4, column 7"), std::string::npos);
  EXPECT_NE(error(bad, state).find("lower train.lr"), std::string::npos);
  for (auto member : {&State::factor, &State::zero, &State::scale_init}) {
    State diverged = state;
    (diverged.*member)[7] = kNan;
    EXPECT_NE(error(w, diverged).find("row 2, column 1"), std::string::npos) << error(w, diverged);
  }
}

TEST(Qat, WrongArgumentsAreRefused) {
  const Setting s;
  const std::vector<float> w = Weights(s, 12);
  const Linear linear(s);
  FakeCall call;
  Apply(s, &call);
  const qm_tensor in = call.Tensor(w, {s.rows, s.cols});
  const qm_tensor short_in = call.Tensor(w, {s.rows / 2, s.cols * 2});
  std::vector<qm_named_tensor> params = Tensors(call, s, Trained(s, 70));
  qm_tensor out = call.Tensor(w, {s.rows, s.cols});
  const auto forward = [&](const qm_tensor& x, uint64_t count, qm_tensor* to) {
    return Table().forward(call.get(), &linear.info, &x, params.data(), count, nullptr, to);
  };
  EXPECT_EQ(forward(in, 3, &out), QM_OK);
  EXPECT_EQ(forward(short_in, 3, &out), QM_INVALID_ARGUMENT);
  EXPECT_EQ(forward(in, 2, &out), QM_INVALID_ARGUMENT);  // scale_init is missing
  EXPECT_NE(call.error().find("scale_init"), std::string::npos) << call.error();
  qm_tensor integers = out;
  integers.dtype = QM_I32;
  EXPECT_EQ(forward(in, 3, &integers), QM_INVALID_ARGUMENT);
  qm_tensor strided = in;
  strided.stride[0] = s.cols * 2;
  EXPECT_EQ(forward(strided, 3, &out), QM_INVALID_ARGUMENT);
  params[0].tensor.shape[1] = 1;
  EXPECT_EQ(forward(in, 3, &out), QM_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace quantmill::qat::testing
