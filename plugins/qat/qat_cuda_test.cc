// The kernels of qat against its CPU path: the same bits but for the sums of gradients.
#include <gtest/gtest.h>

#include <limits>
#include <memory>
#include <tuple>

#include "qat_test_util.h"

#if defined(QM_HAVE_CUDA)
namespace quantmill::qat::testing {
namespace {

// Rows, columns, bits, group size, symmetric, type of scales.
using Case = std::tuple<int64_t, int64_t, int, int64_t, bool, qm_dtype>;

class QatCuda : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (!qm::testing::HaveGpu()) GTEST_SKIP() << "no GPU";
    std::tie(s.rows, s.cols, s.bits, s.group_size, s.symmetric, s.scale_dtype) = GetParam();
    Apply(s, &cpu);
    gpu = std::make_unique<FakeCall>(qm_device{QM_CUDA, 0});
    Apply(s, gpu.get());
    w = Normal(s.rows * s.cols, 1, 0.01f * s.max_code());
    above = Normal(s.rows * s.cols, 2, 1.0f);
    state = Trained(s, 3);
  }

  template <class T>
  void ExpectSameForward() {
    std::vector<T> a, b;
    ASSERT_EQ(Forward(cpu, s, w, state, &a), QM_OK) << cpu.error();
    ASSERT_EQ(Forward(*gpu, s, w, state, &b), QM_OK) << gpu->error();
    EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(T)), 0);
  }

  Setting s;
  FakeCall cpu;
  std::unique_ptr<FakeCall> gpu;
  std::vector<float> w, above;
  State state;
};

TEST_P(QatCuda, ForwardHasTheBitsOfTheCpu) {
  ExpectSameForward<float>();
  ExpectSameForward<qm::F16>();
  ExpectSameForward<qm::BF16>();
}

TEST_P(QatCuda, VjpAgreesWithTheCpu) {
  Slopes a, b, again;
  ASSERT_EQ(Vjp(cpu, s, w, state, above, 0.25f, &a), QM_OK) << cpu.error();
  ASSERT_EQ(Vjp(*gpu, s, w, state, above, 0.25f, &b), QM_OK) << gpu->error();
  ASSERT_EQ(Vjp(*gpu, s, w, state, above, 0.25f, &again), QM_OK) << gpu->error();
  EXPECT_EQ(a.weight, b.weight);
  EXPECT_EQ(b.params.factor, again.params.factor);
  EXPECT_EQ(b.params.zero, again.params.zero);
  for (int64_t index = 0; index < s.all_groups(); ++index) {
    double factor_size = 0.25, zero_size = 0.25;
    const size_t at = static_cast<size_t>(index);
    for (int64_t i = index * s.width(); i < (index + 1) * s.width(); ++i) {
      const SlowCell cell = Slow(s, state, index, w[static_cast<size_t>(i)]);
      const double g = std::fabs(above[static_cast<size_t>(i)]);
      factor_size += g * static_cast<double>(state.scale_init[at]) *
                     (std::fabs(cell.code - cell.zero) + std::fabs(cell.quotient));
      zero_size += g * cell.scale;
    }
    const double eps = 2.0 * static_cast<double>(s.width() + 4) * 0x1p-24;
    EXPECT_NEAR(a.params.factor[at], b.params.factor[at], eps * factor_size) << index;
    if (s.symmetric) continue;
    EXPECT_NEAR(a.params.zero[at], b.params.zero[at], eps * zero_size) << index;
  }
}

TEST_P(QatCuda, InitAndFinalizeHaveTheBitsOfTheCpu) {
  State a, b;
  ASSERT_EQ(Init(cpu, Linear(s), s, w, &a), QM_OK) << cpu.error();
  ASSERT_EQ(Init(*gpu, Linear(s), s, w, &b), QM_OK) << gpu->error();
  EXPECT_EQ(a.factor, b.factor);
  EXPECT_EQ(a.scale_init, b.scale_init);
  EXPECT_EQ(a.zero, b.zero);
  qm_packed packed_a = {}, packed_b = {};
  ASSERT_EQ(Finalize(cpu, s, w, state, &packed_a), QM_OK) << cpu.error();
  ASSERT_EQ(Finalize(*gpu, s, w, state, &packed_b), QM_OK) << gpu->error();
  EXPECT_EQ(cpu.Read<int32_t>(0, "codes"), gpu->Read<int32_t>(0, "codes"));
  EXPECT_EQ(qm::testing::ReadScales(cpu, cpu.EmittedTensor(0, "scale")),
            qm::testing::ReadScales(*gpu, gpu->EmittedTensor(0, "scale")));
  if (!s.symmetric) {
    EXPECT_EQ(cpu.Read<uint8_t>(0, "zero"), gpu->Read<uint8_t>(0, "zero"));
  }
}

// The packed weight of one call as the base of the next.
TEST_P(QatCuda, StartsFromABaseWithTheBitsOfTheCpu) {
  const auto start = [&](FakeCall& call, State* out, std::vector<float>* weight) {
    qm_packed base = {};
    ASSERT_EQ(Finalize(call, s, w, state, &base), QM_OK) << call.error();
    call.Set("init", "gptq");
    Linear linear(s);
    linear.info.base = &base;
    const std::vector<float> original = Normal(s.rows * s.cols, 4, 0.01f * s.max_code());
    ASSERT_EQ(Init(call, linear, s, original, out), QM_OK) << call.error();
    *weight = call.Read<float>(0, "weight");
  };
  State a, b;
  std::vector<float> wa, wb;
  start(cpu, &a, &wa);
  start(*gpu, &b, &wb);
  EXPECT_EQ(wa, wb);
  EXPECT_EQ(a.scale_init, b.scale_init);
  EXPECT_EQ(a.zero, b.zero);
}

// Groups of 4 lanes to a block; widths and rows that leave lanes and warps without work; columns
// that no vector fits.
INSTANTIATE_TEST_SUITE_P(
    All, QatCuda,
    ::testing::Values(Case{33, 384, 4, 128, false, QM_F16}, Case{7, 384, 3, 64, true, QM_BF16},
                      Case{5, 96, 2, 16, false, QM_F16}, Case{3, 72, 4, 36, false, QM_F32},
                      Case{1, 8, 8, 4, false, QM_F16}, Case{9, 30, 4, 10, false, QM_F16},
                      Case{2, 13, 3, -1, false, QM_F16}, Case{4, 1000, 4, -1, true, QM_F16},
                      Case{5, 2056, 4, -1, false, QM_BF16}, Case{3, 14336, 8, -1, false, QM_F16},
                      Case{2, 3001, 2, -1, false, QM_F32}, Case{3, 1, 4, -1, false, QM_F16}));

TEST(QatCudaErrors, ValuesThatAreNotFiniteAreNamed) {
  if (!qm::testing::HaveGpu()) GTEST_SKIP() << "no GPU";
  const Setting s;
  std::vector<float> w = Normal(s.rows * s.cols, 5);
  w[4 * 384 + 9] = std::numeric_limits<float>::quiet_NaN();
  w[5 * 384 + 1] = std::numeric_limits<float>::infinity();
  FakeCall call({QM_CUDA, 0});
  Apply(s, &call);
  State state;
  EXPECT_EQ(Init(call, Linear(s), s, w, &state), QM_INVALID_ARGUMENT);
  EXPECT_NE(call.error().find("row 4, column 9"), std::string::npos) << call.error();
  qm_packed packed = {};
  EXPECT_EQ(Finalize(call, s, w, Trained(s, 6), &packed), QM_INVALID_ARGUMENT);
  EXPECT_NE(call.error().find("row 4, column 9"), std::string::npos) << call.error();
}

}  // namespace
}  // namespace quantmill::qat::testing
#endif  // QM_HAVE_CUDA
