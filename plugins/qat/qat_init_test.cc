// Where qat's training starts, what its plan says, and what it refuses.
#include <gtest/gtest.h>

#include <limits>
#include <tuple>

#include "qat_test_util.h"

namespace quantmill::qat::testing {
namespace {

// ---- a packed weight
// -----------------------------------------------------------------------------
struct PackedWeight {
  std::vector<int> codes;            // [rows, cols]
  std::vector<uint8_t> zeros;        // [rows, groups]
  std::vector<float> float_zeros;    // in place of zeros unless empty
  std::vector<float> scales;         // [rows, groups]
  std::vector<int32_t> group_index;  // unless empty
};

// qm_packed over tensors of a call.
struct PackedTensors {
  PackedTensors(FakeCall& call, const Setting& s, const PackedWeight& w) {
    const int64_t words = (s.cols * s.bits + 31) / 32;
    std::vector<int32_t> stream(static_cast<size_t>(s.rows * words));
    for (int64_t i = 0; i < s.rows * s.cols; ++i) {
      for (int b = 0; b < s.bits; ++b) {
        if (((w.codes[static_cast<size_t>(i)] >> b) & 1) == 0) continue;
        const int64_t bit = i % s.cols * s.bits + b;
        auto& word = stream[static_cast<size_t>(i / s.cols * words + bit / 32)];
        word = static_cast<int32_t>(static_cast<uint32_t>(word) | 1u << (bit % 32));
      }
    }
    const std::vector<int64_t> per_group = {s.rows, s.groups()};
    named.push_back({"codes", call.Tensor(stream, {s.rows, words})});
    if (s.scale_dtype == QM_F16) {
      std::vector<qm::F16> half;
      for (const float x : w.scales) half.push_back(qm::ToF16(x));
      named.push_back({"scale", call.Tensor(half, per_group)});
    } else {
      named.push_back({"scale", call.Tensor(w.scales, per_group)});
    }
    const bool whole = w.float_zeros.empty();
    if (!s.symmetric) {
      named.push_back({"zero", whole ? call.Tensor(w.zeros, per_group)
                                     : call.Tensor(w.float_zeros, per_group)});
    }
    if (!w.group_index.empty()) {
      named.push_back({"group_index", call.Tensor(w.group_index, {s.cols})});
    }
    json = "{\"bits\":" + std::to_string(s.bits) +
           ",\"group_size\":" + std::to_string(s.group_size) + ",\"zero\":\"" +
           (s.symmetric ? "none"
            : whole     ? "int"
                        : "float") +
           "\"}";
    packed = {"qm.fmt.affine-int/1", json.c_str(), named.data(), named.size(), s.rows, s.cols};
  }
  PackedTensors(const PackedTensors&) = delete;
  PackedTensors& operator=(const PackedTensors&) = delete;

  std::vector<qm_named_tensor> named;
  std::string json;
  qm_packed packed = {};
};

// Codes that rounding to nearest would not choose.
PackedWeight RandomPacked(const Setting& s, uint32_t seed) {
  std::mt19937 engine(seed);
  PackedWeight out;
  for (int64_t i = 0; i < s.rows * s.cols; ++i) {
    out.codes.push_back(static_cast<int>(engine() % (1u << s.bits)));
  }
  for (int64_t i = 0; i < s.all_groups(); ++i) {
    out.zeros.push_back(static_cast<uint8_t>(engine() % (1u << s.bits)));
    out.scales.push_back(0.01f + 0.02f * static_cast<float>(engine() % 1000) / 1000.0f);
  }
  return out;
}

class QatStarts : public ::testing::TestWithParam<std::tuple<int, int64_t, bool, qm_dtype>> {
 protected:
  Setting Make() const {
    Setting s;
    std::tie(s.bits, s.group_size, s.symmetric, s.scale_dtype) = GetParam();
    return s;
  }
};

TEST_P(QatStarts, MseTakesTheRangeOfLeastSquaredError) {
  const Setting s = Make();
  std::vector<float> w = Normal(s.rows * s.cols, 1);
  for (size_t i = 0; i < w.size(); i += 97) w[i] *= 6.0f;
  FakeCall call;
  Apply(s, &call);
  State state;
  ASSERT_EQ(Init(call, Linear(s), s, w, &state), QM_OK) << call.error();
  const auto error = [&](int64_t index, float scale, float zero) {
    double sum = 0;
    for (int64_t i = index * s.width(); i < (index + 1) * s.width(); ++i) {
      const float x = w[static_cast<size_t>(i)];
      const double code = std::clamp(std::nearbyint(x / scale) + static_cast<double>(zero), 0.0,
                                     static_cast<double>(s.max_code()));
      const double d = static_cast<double>(scale) * (code - zero) - x;
      sum += d * d;
    }
    return sum;
  };
  for (int64_t index = 0; index < s.all_groups(); ++index) {
    float lo = 0, hi = 0;
    for (int64_t i = index * s.width(); i < (index + 1) * s.width(); ++i) {
      lo = std::min(lo, w[static_cast<size_t>(i)]);
      hi = std::max(hi, w[static_cast<size_t>(i)]);
    }
    if (s.symmetric) hi = std::max(hi, -lo), lo = -hi;
    double best = INFINITY;
    for (int step = 0; step < 80; ++step) {
      const float p = 1.0f - static_cast<float>(step) / 100.0f;
      const float scale = StoredScale(s.scale_dtype, (p * hi - p * lo) / s.max_code());
      const float zero = s.symmetric
                             ? (s.max_code() + 1) / 2
                             : std::clamp(std::nearbyint(-p * lo / scale), 0.0f, s.max_code());
      best = std::min(best, error(index, scale, zero));
    }
    const size_t at = static_cast<size_t>(index);
    ASSERT_EQ(state.factor[at], 1.0f);
    const float zero = s.symmetric ? (s.max_code() + 1) / 2 : state.zero[at];
    const double slack = 1.0 + 2.0 * static_cast<double>(s.width()) * 6e-8;  // of sums in f32
    EXPECT_LE(error(index, state.scale_init[at], zero), best * slack) << index;
  }
  EXPECT_FALSE(call.Emitted(0, "weight"));
}

TEST_P(QatStarts, APackedBaseIsWhereTrainingStarts) {
  Setting s = Make();
  if (s.scale_dtype == QM_BF16) s.scale_dtype = QM_F32;
  const std::vector<float> w = Normal(s.rows * s.cols, 2, 0.01f * s.max_code());
  const PackedWeight packed = RandomPacked(s, 3);
  for (const char* init : {"gptq", "awq", "hqq"}) {
    s.init = init;
    FakeCall call;
    Apply(s, &call);
    const PackedTensors base(call, s, packed);
    Linear linear(s);
    linear.info.base = &base.packed;
    State state;
    ASSERT_EQ(Init(call, linear, s, w, &state), QM_OK) << call.error();
    const std::vector<float> start = call.Read<float>(0, "weight");
    std::vector<float> out;
    ASSERT_EQ(Forward(call, s, start, state, &out), QM_OK) << call.error();
    const std::vector<double> want = qm::testing::ReadAffine(call, base.packed, s.bits).Values();
    for (size_t i = 0; i < w.size(); ++i) {
      ASSERT_EQ(out[i], static_cast<float>(want[i])) << i;
      // As near to the original as 0.49 of a step allows.
      const size_t group = i / static_cast<size_t>(s.width());
      const double reach = 0.49 * static_cast<double>(state.scale_init[group]);
      const double nearest =
          std::clamp(static_cast<double>(w[i]), want[i] - reach, want[i] + reach);
      const double rounding = 8 * 0x1p-24 * (std::fabs(nearest) + std::fabs(want[i]));
      ASSERT_NEAR(start[i], nearest, rounding) << i;
    }
    EXPECT_TRUE(call.CanariesIntact());
  }
}

INSTANTIATE_TEST_SUITE_P(All, QatStarts,
                         ::testing::Combine(::testing::Values(2, 3, 4, 8),
                                            ::testing::Values<int64_t>(128, -1, 24),
                                            ::testing::Bool(),
                                            ::testing::Values(QM_F16, QM_BF16, QM_F32)));

// ---- other bases
// -----------------------------------------------------------------------------------
TEST(QatStart, FloatZeroPointsAreRoundedAndWeightsKept) {
  Setting s;
  s.init = "hqq";
  PackedWeight packed = RandomPacked(s, 4);
  packed.float_zeros = Normal(s.all_groups(), 5, 3.0f, 7.0f);
  packed.float_zeros[0] = -2.0f;
  packed.float_zeros[1] = 99.0f;
  FakeCall call;
  Apply(s, &call);
  const PackedTensors base(call, s, packed);
  Linear linear(s);
  linear.info.base = &base.packed;
  State state;
  const std::vector<float> w = Normal(s.rows * s.cols, 6);
  ASSERT_EQ(Init(call, linear, s, w, &state), QM_OK) << call.error();
  EXPECT_FALSE(call.Emitted(0, "weight"));
  for (size_t i = 0; i < packed.scales.size(); ++i) {
    EXPECT_EQ(state.scale_init[i], StoredScale(QM_F16, packed.scales[i]));
    EXPECT_EQ(state.zero[i], std::clamp(std::nearbyint(packed.float_zeros[i]), 0.0f, 15.0f));
  }
}

qm_status InitWith(const Setting& s, const PackedWeight& packed, std::string* error,
                   const char* drop = nullptr) {
  FakeCall call;
  Apply(s, &call);
  PackedTensors base(call, s, packed);
  if (drop != nullptr) {
    base.named.erase(std::find_if(base.named.begin(), base.named.end(),
                                  [&](const auto& t) { return std::string(t.name) == drop; }));
    base.packed.tensor_count = base.named.size();
  }
  Linear linear(s);
  linear.info.base = &base.packed;
  State state;
  const qm_status code = Init(call, linear, s, Normal(s.rows * s.cols, 7), &state);
  *error = call.error();
  return code;
}

TEST(QatStart, PermutedGroupsAreRefusedWithARemedy) {
  Setting s;
  s.init = "gptq";
  PackedWeight packed = RandomPacked(s, 8);
  for (int32_t i = 0; i < s.cols; ++i) packed.group_index.push_back(i / 128);
  std::string error;
  EXPECT_EQ(InitWith(s, packed, &error), QM_OK) << error;
  std::swap(packed.group_index[5], packed.group_index[300]);
  EXPECT_EQ(InitWith(s, packed, &error), QM_FAILED_PRECONDITION);
  EXPECT_NE(error.find("static_groups: true"), std::string::npos) << error;
  EXPECT_NE(error.find("channel 5 is in group 2"), std::string::npos) << error;
}

TEST(QatStart, DamagedBasesAreRefused) {
  Setting s;
  s.init = "gptq";
  std::string error;
  for (const char* name : {"codes", "scale", "zero"}) {
    EXPECT_EQ(InitWith(s, RandomPacked(s, 9), &error, name), QM_INVALID_ARGUMENT);
    EXPECT_NE(error.find(name), std::string::npos) << error;
  }
  for (const float bad : {0.0f, -1.0f, std::numeric_limits<float>::quiet_NaN(),
                          std::numeric_limits<float>::infinity()}) {
    PackedWeight packed = RandomPacked(s, 10);
    packed.scales[7] = bad;
    EXPECT_EQ(InitWith(s, packed, &error), QM_INVALID_ARGUMENT);
    EXPECT_NE(error.find("row 2, group 1"), std::string::npos) << error;
  }
}

// ---- weights
// ---------------------------------------------------------------------------------------
TEST(QatStart, NotFiniteWeightIsNamed) {
  for (const char* init : {"mse", "gptq"}) {
    Setting s;
    s.init = init;
    std::vector<float> w = Normal(s.rows * s.cols, 11);
    w[4 * 384 + 9] = std::numeric_limits<float>::quiet_NaN();
    w[5 * 384 + 1] = -std::numeric_limits<float>::infinity();
    FakeCall call;
    call.Threads(2);
    Apply(s, &call);
    const PackedTensors base(call, s, RandomPacked(s, 12));
    Linear linear(s);
    if (s.init != "mse") linear.info.base = &base.packed;
    State state;
    EXPECT_EQ(Init(call, linear, s, w, &state), QM_INVALID_ARGUMENT);
    EXPECT_NE(call.error().find("row 4, column 9"), std::string::npos) << call.error();
  }
}

// Zeros, constants, one huge weight, tiny and huge weights, one row.
TEST(QatStart, OddWeightsGiveFiniteGrids) {
  Setting s;
  s.rows = 6;
  std::vector<float> w = Normal(s.rows * s.cols, 13);
  for (int64_t c = 0; c < s.cols; ++c) {
    w[0 * 384 + c] = 0.0f;
    w[1 * 384 + c] = 0.25f;
    w[2 * 384 + c] *= 1e-12f;
    w[3 * 384 + c] *= 1e12f;
  }
  w[4 * 384 + 17] = 3e4f;
  for (const int64_t rows : {int64_t{6}, int64_t{1}}) {
    s.rows = rows;
    w.resize(static_cast<size_t>(rows * s.cols));
    FakeCall call;
    Apply(s, &call);
    State state;
    ASSERT_EQ(Init(call, Linear(s), s, w, &state), QM_OK) << call.error();
    std::vector<float> out;
    ASSERT_EQ(Forward(call, s, w, state, &out), QM_OK);
    Slopes slopes;
    ASSERT_EQ(Vjp(call, s, w, state, w, 0.0f, &slopes), QM_OK);
    for (size_t i = 0; i < 384; ++i) ASSERT_EQ(out[i], 0.0f) << i;  // zeros stay zeros
    for (size_t i = 0; i < out.size(); ++i) {
      ASSERT_TRUE(std::isfinite(out[i])) << i;
    }
    for (size_t i = 0; i < state.zero.size(); ++i) {
      EXPECT_GT(state.scale_init[i], 0.0f);
      EXPECT_TRUE(std::isfinite(slopes.params.factor[i]));
      EXPECT_TRUE(std::isfinite(slopes.params.zero[i]));
    }
    qm_packed packed = {};
    EXPECT_EQ(Finalize(call, s, w, state, &packed), QM_OK) << call.error();
  }
}

// ---- plans
// -----------------------------------------------------------------------------------------
qm_status Plan(FakeCall& call, const Linear& linear, qm_reparam_plan* out) {
  *out = {};
  out->struct_size = sizeof *out;
  return Table().plan(call.get(), &linear.info, out);
}

TEST(QatPlan, SaysWhatIsTrained) {
  Setting s;
  FakeCall call;
  Apply(s, &call);
  qm_reparam_plan plan;
  ASSERT_EQ(Plan(call, Linear(s), &plan), QM_OK) << call.error();
  EXPECT_EQ(plan.kind, QM_REPARAM_WEIGHT);
  EXPECT_EQ(plan.weight_lr_scale, 1.0);
  EXPECT_STREQ(plan.format_id, "qm.fmt.affine-int/1");
  EXPECT_STREQ(plan.format_json, "{\"bits\":4,\"group_size\":128,\"zero\":\"int\"}");
  EXPECT_DOUBLE_EQ(plan.bits_per_weight, 4.0 + 24.0 / 128);
  EXPECT_EQ(plan.saved_bytes_fixed + plan.saved_bytes_per_row, 0u);
  EXPECT_EQ(plan.stat_count, 0u);
  ASSERT_EQ(plan.param_count, 3u);
  const char* const kNames[] = {"scale_factor", "zero", "scale_init"};
  for (int i = 0; i < 3; ++i) {
    EXPECT_STREQ(plan.params[i].name, kNames[i]);
    EXPECT_EQ(plan.params[i].shape[0], s.rows);
    EXPECT_EQ(plan.params[i].shape[1], s.groups());
    EXPECT_EQ((plan.params[i].flags & QM_PARAM_TRAINABLE) != 0, i < 2);
  }
  EXPECT_EQ(plan.params[0].lr_scale, 3.0);
  call.Set("symmetric", "true").Set("scale_lr", "0");
  ASSERT_EQ(Plan(call, Linear(s), &plan), QM_OK) << call.error();
  ASSERT_EQ(plan.param_count, 2u);
  EXPECT_STREQ(plan.params[1].name, "scale_init");
  EXPECT_EQ(plan.params[0].flags & QM_PARAM_TRAINABLE, 0u);
}

TEST(QatPlan, PhasesAndFrozenWeights) {
  const Setting s;
  const Linear blocks(s, QM_PHASE_BLOCK), whole(s, QM_PHASE_END_TO_END);
  const auto plan = [&](const char* phases, const Linear& linear) {
    FakeCall call;
    Apply(s, &call);
    call.Set("phases", phases);
    qm_reparam_plan out;
    return Plan(call, linear, &out);
  };
  EXPECT_EQ(plan("blocks,end_to_end", blocks), QM_OK);
  EXPECT_EQ(plan("blocks,end_to_end", whole), QM_OK);
  EXPECT_EQ(plan("blocks", blocks), QM_OK);
  EXPECT_EQ(plan("blocks", whole), QM_UNIMPLEMENTED);
  EXPECT_EQ(plan("end_to_end", blocks), QM_UNIMPLEMENTED);
  EXPECT_EQ(plan("end_to_end", whole), QM_OK);
  EXPECT_EQ(plan("end_to_end,blocks", whole), QM_INVALID_ARGUMENT);
  FakeCall call;
  Apply(s, &call);
  call.Set("train_weights", "false");
  qm_reparam_plan out;
  ASSERT_EQ(Plan(call, blocks, &out), QM_OK);
  EXPECT_EQ(out.weight_lr_scale, 1.0);
  EXPECT_NE(out.params[1].flags & QM_PARAM_TRAINABLE, 0u);
  ASSERT_EQ(Plan(call, whole, &out), QM_OK);
  EXPECT_EQ(out.weight_lr_scale, 0.0);
  EXPECT_NE(out.params[0].flags & QM_PARAM_TRAINABLE, 0u);
  EXPECT_EQ(out.params[1].flags & QM_PARAM_TRAINABLE, 0u);  // zero points stay too
}

TEST(QatPlan, RefusesWhatItCannotDo) {
  const auto error = [](const std::vector<std::pair<const char*, const char*>>& options,
                        qm_status want, const char* base_json = nullptr,
                        const char* base_id = "qm.fmt.affine-int/1") {
    const Setting s;
    FakeCall call;
    Apply(s, &call);
    for (const auto& [name, value] : options) call.Set(name, value);
    const qm_packed base = {base_id, base_json, nullptr, 0, s.rows, s.cols};
    Linear linear(s);
    if (base_json != nullptr) linear.info.base = &base;
    qm_reparam_plan plan;
    EXPECT_EQ(Plan(call, linear, &plan), want) << call.error();
    return call.error();
  };
  constexpr qm_status kBad = QM_INVALID_ARGUMENT, kNot = QM_FAILED_PRECONDITION;
  const auto has = [](const std::string& text, const char* part) {
    return text.find(part) != std::string::npos ? ::testing::AssertionSuccess()
                                                : ::testing::AssertionFailure() << text;
  };
  EXPECT_TRUE(has(error({{"bits", "5"}}, kBad), "2, 3, 4 or 8"));
  EXPECT_TRUE(has(error({{"group_size", "100"}}, kBad), "use 16, 32, 64, 128"));
  EXPECT_TRUE(has(error({{"init", "rtn"}}, kBad), "mse, gptq, awq or hqq"));
  EXPECT_TRUE(has(error({{"scale_lr", "-1"}}, kBad), "0 or more"));
  EXPECT_TRUE(
      has(error({{"init", "gptq"}}, kNot), "put a gptq stage on these layers before this one"));
  EXPECT_TRUE(has(error({{"init", "awq"}}, kNot), "put an awq stage"));
  constexpr char kSame[] = "{\"bits\":4,\"group_size\":128,\"zero\":\"int\"}";
  EXPECT_TRUE(has(error({}, kNot, kSame), "init: gptq"));
  error({{"init", "gptq"}}, QM_OK, kSame);
  error({{"init", "gptq"}, {"group_size", "-1"}}, QM_OK,
        "{\"bits\":4,\"group_size\":384,\"zero\":\"int\"}");
  error({{"init", "gptq"}, {"symmetric", "true"}}, QM_OK,
        "{\"bits\":4,\"group_size\":128,\"zero\":\"none\"}");
  constexpr char kFloat[] = "{\"bits\":4,\"group_size\":128,\"zero\":\"float\"}";
  error({{"init", "hqq"}}, QM_OK, kFloat);
  EXPECT_TRUE(has(error({{"init", "gptq"}}, kNot, kFloat), "init: hqq"));
  EXPECT_TRUE(has(error({{"init", "gptq"}, {"bits", "3"}}, kNot, kSame), "the same bits"));
  EXPECT_TRUE(has(error({{"init", "gptq"}, {"group_size", "64"}}, kNot, kSame), kSame));
  EXPECT_TRUE(has(error({{"init", "gptq"}, {"symmetric", "true"}}, kNot, kSame), "symmetric"));
  EXPECT_TRUE(has(error({{"init", "hqq"}}, kNot,
                        "{\"axis\":0,\"bits\":4,\"group_size\":128,\"zero\":\"float\"}"),
                  "axis 1"));
  EXPECT_TRUE(has(error({{"init", "gptq"}}, kNot, "{}", "qm.fmt.codebook-absmax/1"),
                  "qm.fmt.codebook-absmax/1"));
}

TEST(QatPlan, OutOfMemoryIsReported) {
  const Setting s;
  for (int64_t nth = 0; nth < 2; ++nth) {
    FakeCall call;
    Apply(s, &call);
    call.FailScratchAt(nth);
    qm_reparam_plan plan;
    EXPECT_EQ(Plan(call, Linear(s), &plan), QM_RESOURCE_EXHAUSTED);
    EXPECT_NE(call.error().find("run.memory"), std::string::npos);
  }
  for (int64_t nth = 0; nth < 3; ++nth) {
    FakeCall call;
    Apply(s, &call);
    call.FailEmitAt(nth);
    qm_packed packed = {};
    EXPECT_EQ(Finalize(call, s, Normal(s.rows * s.cols, 14), Trained(s, 80), &packed),
              QM_RESOURCE_EXHAUSTED);
  }
}

TEST(QatPlan, ACancelledInitStops) {
  const Setting s;
  FakeCall call;
  Apply(s, &call);
  call.CancelAt(0);
  State state;
  EXPECT_EQ(Init(call, Linear(s), s, Normal(s.rows * s.cols, 15), &state), QM_CANCELLED);
}

}  // namespace
}  // namespace quantmill::qat::testing
