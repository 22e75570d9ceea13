// gptq against the published algorithm written out slowly in f64, and its quality against rounding.
#include <gtest/gtest.h>

#include <tuple>

#include "gptq_testing.h"

namespace quantmill::gptq::testing {
namespace {

// f32 against f64: a weight within about 1e-5 steps of a rounding boundary may fall to the other
// side, and the rest of its row then differs too. With these sizes and seeds that is rare.
constexpr double kMismatchesAllowed = 0.01;

void ExpectSlowResult(const Setting& s, const Problem& p) {
  FakeCall call;
  call.Threads(2);
  Apply(s, &call);
  qm_packed packed = {};
  ASSERT_EQ(Quantize(call, s, p, &packed), QM_OK) << call.error();
  EXPECT_TRUE(call.CanariesIntact());
  const AffineContent got = ReadAffine(call, packed, s.bits);
  const AffineContent want = SlowGptq(s, p).Solve();
  EXPECT_EQ(call.Emitted(0, "group_index"), s.act_order && !s.static_groups && s.group_size > 0);
  EXPECT_EQ(call.Emitted(0, "zero"), !s.symmetric);
  EXPECT_EQ(got.group_of, want.group_of);
  const double mismatches = static_cast<double>(Mismatches(got.codes, want.codes));
  EXPECT_LE(mismatches, kMismatchesAllowed * static_cast<double>(want.codes.size()));
  const double error = OutputError(p, got.Values());
  const double slow_error = OutputError(p, want.Values());
  EXPECT_NEAR(error, slow_error, 0.02 * slow_error);
}

class GptqSettings
    : public ::testing::TestWithParam<std::tuple<int, int64_t, bool, bool, bool, bool, double>> {};

TEST_P(GptqSettings, EqualsTheSlowAlgorithm) {
  Setting s;
  std::tie(s.bits, s.group_size, s.symmetric, s.act_order, s.static_groups, s.clip_search,
           s.alpha) = GetParam();
  s.block_size = 40;  // blocks begin and end inside groups
  ExpectSlowResult(s, MakeProblem(11, 96, 300, 7));
}

INSTANTIATE_TEST_SUITE_P(All, GptqSettings,
                         ::testing::Combine(::testing::Values(2, 3, 4, 8),
                                            ::testing::Values<int64_t>(-1, 48), ::testing::Bool(),
                                            ::testing::Bool(), ::testing::Bool(), ::testing::Bool(),
                                            ::testing::Values(0.0, 0.25)));

TEST(Gptq, ManyRowsAndBlocksEqualTheSlowAlgorithm) {
  Setting s;
  s.act_order = true;
  s.alpha = 0.25;
  ExpectSlowResult(s, MakeProblem(70, 320, 700, 8));
}

TEST(Gptq, CorrectionInSeveralPanelsEqualsTheSlowAlgorithm) {
  Setting s;
  s.alpha = 0.25;
  ExpectSlowResult(s, MakeProblem(4, 544, 600, 18));
}

TEST(Gptq, DeadInputsEqualTheSlowAlgorithm) {
  for (const bool act_order : {false, true}) {
    for (const bool static_groups : {false, true}) {
      Setting s;
      s.act_order = act_order;
      s.static_groups = static_groups;
      ExpectSlowResult(s, MakeProblem(9, 96, 300, 9, {0, 17, 40, 41, 95}));
    }
  }
}

TEST(Gptq, OneRowAndOneColumn) {
  Setting s;
  ExpectSlowResult(s, MakeProblem(1, 64, 200, 10));
  s.group_size = -1;
  ExpectSlowResult(s, MakeProblem(5, 1, 50, 11));
  ExpectSlowResult(s, MakeProblem(1, 1, 50, 12));
}

TEST(Gptq, OutputErrorIsBelowRounding) {
  const Problem p = MakeProblem(48, 256, 600, 13);
  const auto error = [&](const Setting& s, int64_t rows_seen) {
    FakeCall call;
    Apply(s, &call);
    Problem seen = p;
    seen.samples = rows_seen;  // 0 asks for plain rounding
    qm_packed packed = {};
    EXPECT_EQ(Quantize(call, s, seen, &packed), QM_OK) << call.error();
    return OutputError(p, ReadAffine(call, packed, s.bits).Values());
  };
  for (const int bits : {2, 3, 4, 8}) {
    for (const bool symmetric : {false, true}) {
      Setting s;
      s.bits = bits;
      s.symmetric = symmetric;
      s.scale_dtype = QM_F16;
      const double rounding = error(s, 0), plain = error(s, p.samples);
      EXPECT_LT(plain, 0.8 * rounding) << bits << " bits";
      s.act_order = true;
      EXPECT_LT(error(s, p.samples), 0.8 * rounding) << bits << " bits";
      s.clip_search = true;
      EXPECT_LT(error(s, p.samples), 0.8 * rounding) << bits << " bits";
    }
  }
}

// GPTAQ minimises || W x_original - Q x ||^2, which is here sum over rows of
// d H d^T + 2 d C^T w^T + const, with d = w - q and C = cross.
TEST(Gptq, CorrectionLowersTheErrorToTheOriginalOutputs) {
  const Problem p = MakeProblem(48, 128, 600, 14);
  const auto error = [&](double alpha) {
    Setting s;
    s.alpha = alpha;
    FakeCall call;
    Apply(s, &call);
    qm_packed packed = {};
    EXPECT_EQ(Quantize(call, s, p, &packed), QM_OK) << call.error();
    const std::vector<double> q = ReadAffine(call, packed, s.bits).Values();
    double sum = OutputError(p, q);
    for (int64_t r = 0; r < p.rows; ++r) {
      for (int64_t i = 0; i < p.cols; ++i) {
        for (int64_t j = 0; j < p.cols; ++j) {
          sum += 2.0 * p.w[r * p.cols + i] * p.cross64[i * p.cols + j] *
                 (p.w[r * p.cols + j] - q[r * p.cols + j]);
        }
      }
    }
    return sum;
  };
  EXPECT_LT(error(0.25), error(0.0));
}

TEST(Gptq, GroupCallGivesTheBytesOfSingleCalls) {
  Setting s;
  s.act_order = true;
  s.alpha = 0.25;
  s.group_size = 32;
  const Problem base = MakeProblem(1, 128, 400, 15);
  std::vector<Problem> parts;
  for (const int64_t rows : {40, 7, 33}) {
    Problem part = base;
    part.rows = rows;
    part.w = MakeProblem(rows, 128, 1, static_cast<uint32_t>(rows)).w;
    parts.push_back(part);
  }
  FakeCall group;
  Apply(s, &group);
  Stats stats(group, base, true);
  std::vector<qm_linear_info> infos;
  std::vector<qm_tensor> weights;
  for (const Problem& part : parts) {
    infos.push_back(Info(part.rows, part.cols));
    weights.push_back(group.Tensor(part.w, {part.rows, part.cols}));
  }
  const qm_linear_info* info_list[] = {&infos[0], &infos[1], &infos[2]};
  const qm_stats* stats_list[] = {stats.get(), stats.get(), stats.get()};
  std::vector<qm_packed> packed(3);
  ASSERT_EQ(Table().run_group(group.get(), 3, info_list, weights.data(), stats_list, packed.data()),
            QM_OK)
      << group.error();
  EXPECT_EQ(group.cholesky_calls(), 1);
  for (uint64_t i = 0; i < 3; ++i) {
    FakeCall single;
    Apply(s, &single);
    qm_packed alone = {};
    ASSERT_EQ(Quantize(single, s, parts[i], &alone), QM_OK) << single.error();
    for (const char* name : {"codes", "group_index"}) {
      EXPECT_EQ(group.Read<int32_t>(i, name), single.Read<int32_t>(0, name)) << name;
    }
    EXPECT_EQ(group.Read<float>(i, "scale"), single.Read<float>(0, "scale"));
    EXPECT_EQ(group.Read<uint8_t>(i, "zero"), single.Read<uint8_t>(0, "zero"));
  }
}

TEST(Gptq, ThreadsDoNotChangeTheBytes) {
  Setting s;
  s.clip_search = true;
  s.act_order = true;
  const Problem p = MakeProblem(100, 192, 400, 16);
  std::vector<std::vector<int32_t>> results;
  for (const int threads : {0, 1, 3}) {
    FakeCall call;
    call.Threads(threads);
    Apply(s, &call);
    qm_packed packed = {};
    ASSERT_EQ(Quantize(call, s, p, &packed), QM_OK) << call.error();
    results.push_back(call.Read<int32_t>(0, "codes"));
  }
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(results[0], results[2]);
}

// Equal diagonal entries keep their order: with all equal, act-order changes nothing.
TEST(Gptq, TiesOfTheDiagonalKeepTheirOrder) {
  Problem p = MakeProblem(6, 64, 100, 17);
  std::fill(p.hessian.begin(), p.hessian.end(), 0.0f);
  for (int64_t i = 0; i < 64; ++i) p.hessian[i * 64 + i] = 2.0f;
  std::vector<std::vector<int32_t>> results;
  for (const bool act_order : {false, true}) {
    Setting s;
    s.act_order = act_order;
    FakeCall call;
    Apply(s, &call);
    qm_packed packed = {};
    ASSERT_EQ(Quantize(call, s, p, &packed), QM_OK) << call.error();
    results.push_back(call.Read<int32_t>(0, "codes"));
  }
  EXPECT_EQ(results[0], results[1]);
}

}  // namespace
}  // namespace quantmill::gptq::testing
