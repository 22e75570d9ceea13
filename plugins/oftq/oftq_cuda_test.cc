// Kernels against the CPU path.
#include <gtest/gtest.h>

#include <cmath>

#include "oftq_test_util.h"

namespace quantmill::oftq::testing {
namespace {

constexpr qm_device kGpu = {QM_CUDA, 0};

class OftqCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!qm::testing::HaveGpu()) GTEST_SKIP() << "no GPU here";
  }
};

// relative: to the size of all; rounding: of each value on both sides.
void ExpectClose(const std::vector<float>& got, const std::vector<float>& want, double relative,
                 const char* what, double rounding = 0.0) {
  ASSERT_EQ(got.size(), want.size()) << what;
  const double bound = relative * Size(want) + 1e-12;
  for (size_t i = 0; i < want.size(); ++i) {
    ASSERT_LE(std::fabs(got[i] - want[i]), bound + 2.0 * rounding * std::fabs(want[i]))
        << what << " " << i;
  }
}

template <class T>
std::vector<T> As(const std::vector<float>& values) {
  std::vector<T> out;
  for (const float x : values) {
    if constexpr (std::is_same_v<T, float>) out.push_back(x);
    if constexpr (std::is_same_v<T, qm::F16>) out.push_back(qm::ToF16(x));
    if constexpr (std::is_same_v<T, qm::BF16>) out.push_back(qm::ToBF16(x));
  }
  return out;
}

// rounding: of the type of x and the result.
template <class T>
void Compare(const Setting& s, int64_t rows, double rounding, double tolerance) {
  SCOPED_TRACE(::testing::Message()
               << s.method << " " << s.in << " to " << s.out << ", block " << s.block << ", terms "
               << s.terms << ", rank " << s.rank << ", rows " << rows << ", bytes " << sizeof(T));
  const Values params = RandomParams(s, 7, s.lora() ? 0.2f : 0.05f);
  const std::vector<T> x = As<T>(Normal(rows * s.in, 8));
  const std::vector<float> above = Normal(rows * s.width(), 9);
  const Result want = Compute(s, x, params, above), got = Compute(s, x, params, above, kGpu);
  ASSERT_EQ(want.code, QM_OK) << want.error;
  ASSERT_EQ(got.code, QM_OK) << got.error;
  // Neighbours of 16 bits are up to two roundings of the value apart.
  ExpectClose(got.out, want.out, tolerance, "the result", rounding);
  ExpectClose(got.d_in, want.d_in, tolerance, "d_in");
  for (size_t p = 0; p < want.d_params.size(); ++p) {
    ExpectClose(got.d_params[p], want.d_params[p], tolerance, "a parameter's gradient");
  }
  const Result again = Compute(s, x, params, above, kGpu);
  EXPECT_EQ(again.out, got.out);
  EXPECT_EQ(again.d_in, got.d_in);
  EXPECT_EQ(again.d_params, got.d_params);
  // Without saved bytes the same; gradients are added.
  EXPECT_EQ(Compute(s, x, params, {}, kGpu).out, got.out);
  const Result added = Compute(s, x, params, above, kGpu, 1, 1.0f);
  const double bound = 1e-5 * (1.0 + Size(got.d_in));
  for (size_t i = 0; i < added.d_in.size(); ++i) {
    ASSERT_NEAR(added.d_in[i], got.d_in[i] + 1.0f, bound);
  }
}

TEST_F(OftqCuda, RotationsOfEverySize) {
  for (const int64_t block : {2, 3, 4, 5, 16, 31, 32, 33, 44, 48, 64, 96, 127, 128}) {
    for (const int64_t terms : {0, 2, 3, 5, 12}) {
      for (const int64_t rows : {1, 130}) {
        Setting s;
        s.block = block;
        s.terms = terms;
        s.in = 3 * block;
        s.out = 8;
        Compare<float>(s, rows, 0x1p-24, 4.0 * SumTolerance(block + rows));
      }
    }
  }
}

TEST_F(OftqCuda, RotationsOfAWideLinear) {
  struct {
    int64_t block, rows;
  } constexpr kCases[] = {{32, 1}, {32, 7}, {32, 128}, {32, 1000}, {64, 130}, {128, 7}, {128, 260}};
  for (const auto& c : kCases) {
    Setting s;
    s.in = 4096;
    s.out = 64;
    s.block = c.block;
    const double tolerance = 4.0 * SumTolerance(c.rows + c.block);
    Compare<float>(s, c.rows, 0x1p-24, tolerance);
    Compare<qm::F16>(s, c.rows, 0x1p-11, tolerance);
    Compare<qm::BF16>(s, c.rows, 0x1p-8, tolerance);
  }
}

TEST_F(OftqCuda, LowRank) {
  for (const int64_t rank : {1, 3, 8, 64, 70}) {
    for (const int64_t rows : {1, 65, 500}) {
      Setting s;
      s.method = "lora";
      s.in = rows == 65 ? 1024 : 1030;
      s.out = rows == 65 ? 128 : 129;
      s.rank = rank;
      const double tolerance = 4.0 * SumTolerance(s.in + rows);
      Compare<float>(s, rows, 0x1p-24, tolerance);
      Compare<qm::F16>(s, rows, 0x1p-11, tolerance);
      Compare<qm::BF16>(s, rows, 0x1p-8, tolerance);
    }
  }
}

TEST_F(OftqCuda, LowRankOfManyRows) {
  Setting s;
  s.method = "lora";
  s.in = 64;
  s.out = 32;
  Compare<float>(s, 17000, 0x1p-24, 4.0 * SumTolerance(17000));
}

// Widths divisible by four, read as vectors, and one number of x that is not finite.
TEST_F(OftqCuda, LowRankPassesOnWhatIsNotFinite) {
  Setting s;
  s.method = "lora";
  s.in = 96;
  s.out = 64;
  s.rank = 4;
  const Values params = RandomParams(s, 7, 0.2f);
  for (const float bad : {NAN, -NAN, INFINITY}) {
    std::vector<float> x = Normal(70 * s.in, 8);
    x[3 * s.in + 5] = bad;
    const auto expect_row_three = [&](const Result& got) {
      ASSERT_EQ(got.code, QM_OK) << got.error;
      for (int64_t i = 0; i < 70 * s.out; ++i) {
        ASSERT_EQ(std::isfinite(got.out[i]), i / s.out != 3) << i;
      }
    };
    expect_row_three(Compute(s, x, params, {}, kGpu));
    expect_row_three(Compute(s, As<qm::F16>(x), params, {}, kGpu));
    expect_row_three(Compute(s, As<qm::BF16>(x), params, {}, kGpu));
  }
}

TEST_F(OftqCuda, FreshParametersAreThoseOfTheCpu) {
  for (const char* method : {"oft", "lora"}) {
    Setting s;
    s.method = method;
    s.in = 96;
    s.out = 40;
    std::vector<Values> values;
    for (const qm_device device : {qm_device{QM_CPU, 0}, kGpu}) {
      FakeCall call(device);
      Apply(s, &call);
      call.Seed(77);
      const Linear linear(s);
      auto params = ParamTensors(s, RandomParams(s, 1, 1.0f), &call);
      ASSERT_EQ(
          Table().init(call.get(), &linear.info, nullptr, nullptr, params.data(), params.size()),
          QM_OK)
          << call.error();
      values.emplace_back();
      for (const auto& t : params) values.back().push_back(call.Read<float>(t.tensor));
    }
    EXPECT_EQ(values[0], values[1]) << method;
  }
}

TEST_F(OftqCuda, MergedWeights) {
  for (const char* method : {"oft", "lora"}) {
    Setting s;
    s.method = method;
    s.in = 96;
    s.out = 200;
    const std::vector<float> w = Normal(s.out * s.in, 1);
    std::vector<std::vector<float>> merged;
    for (const qm_device device : {qm_device{QM_CPU, 0}, kGpu}) {
      for (const bool bad : {false, true}) {
        Values params = RandomParams(s, 7, 0.1f);
        if (bad) params.back()[11] = NAN;
        FakeCall call(device);
        Apply(s, &call);
        const Linear linear(s);
        const qm_tensor weight = call.Tensor(w, {s.out, s.in});
        const auto theta = ParamTensors(s, params, &call);
        qm_packed packed = {};
        const qm_status code = Table().finalize(call.get(), &linear.info, &weight, theta.data(),
                                                theta.size(), &packed);
        EXPECT_EQ(code, bad ? QM_INVALID_ARGUMENT : QM_OK) << call.error();
        if (!bad) merged.push_back(call.Read<float>(0, "weight"));
      }
    }
    ASSERT_EQ(merged.size(), 2u);
    ExpectClose(merged[1], merged[0], 4.0 * SumTolerance(40), method);
  }
}

}  // namespace
}  // namespace quantmill::oftq::testing
