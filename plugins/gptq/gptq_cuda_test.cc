// The CUDA path of gptq against the CPU path.
#include <gtest/gtest.h>

#include <tuple>

#include "gptq_testing.h"

#if defined(QM_HAVE_CUDA)
namespace quantmill::gptq::testing {
namespace {

bool NoGpu() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0;
}

class GptqCuda
    : public ::testing::TestWithParam<std::tuple<int, int64_t, bool, bool, bool, bool, double>> {};

// The fake host computes products and factors the same way for both, and the kernels do the
// arithmetic of the CPU in its order: the bytes are equal. On a real host the sums of the two gemms
// differ, and codes near a rounding boundary with them.
TEST_P(GptqCuda, GivesTheBytesOfTheCpu) {
  if (NoGpu()) GTEST_SKIP() << "no GPU";
  Setting s;
  std::tie(s.bits, s.group_size, s.symmetric, s.act_order, s.static_groups, s.clip_search,
           s.alpha) = GetParam();
  s.scale_dtype = QM_F16;
  s.block_size = 80;
  const Problem p = MakeProblem(45, 192, 400, 20, {7, 100});
  FakeCall cpu, gpu({QM_CUDA, 0});
  Apply(s, &cpu);
  Apply(s, &gpu);
  qm_packed a = {}, b = {};
  ASSERT_EQ(Quantize(cpu, s, p, &a), QM_OK) << cpu.error();
  ASSERT_EQ(Quantize(gpu, s, p, &b), QM_OK) << gpu.error();
  const AffineContent want = ReadAffine(cpu, a, s.bits), got = ReadAffine(gpu, b, s.bits);
  EXPECT_EQ(got.group_of, want.group_of);
  EXPECT_EQ(Mismatches(got.codes, want.codes), 0);
  EXPECT_EQ(got.scale, want.scale);
  EXPECT_EQ(got.zero, want.zero);
}

INSTANTIATE_TEST_SUITE_P(All, GptqCuda,
                         ::testing::Combine(::testing::Values(2, 3, 4, 8),
                                            ::testing::Values<int64_t>(-1, 16, 96),
                                            ::testing::Bool(), ::testing::Bool(), ::testing::Bool(),
                                            ::testing::Bool(), ::testing::Values(0.0, 0.25)));

TEST(GptqCuda, NoRowsMeansPlainRounding) {
  if (NoGpu()) GTEST_SKIP() << "no GPU";
  Problem p = MakeProblem(45, 192, 10, 21);
  p.samples = 0;
  const Setting s;
  FakeCall cpu, gpu({QM_CUDA, 0});
  Apply(s, &cpu);
  Apply(s, &gpu);
  qm_packed a = {}, b = {};
  ASSERT_EQ(Quantize(cpu, s, p, &a), QM_OK) << cpu.error();
  ASSERT_EQ(Quantize(gpu, s, p, &b), QM_OK) << gpu.error();
  EXPECT_EQ(cpu.Read<int32_t>(0, "codes"), gpu.Read<int32_t>(0, "codes"));
}

TEST(GptqCuda, NotFiniteInputsAreNamed) {
  if (NoGpu()) GTEST_SKIP() << "no GPU";
  const Setting s;
  Problem p = MakeProblem(45, 192, 100, 22);
  p.w[40 * 192 + 9] = INFINITY;
  FakeCall call({QM_CUDA, 0});
  Apply(s, &call);
  qm_packed packed = {};
  EXPECT_EQ(Quantize(call, s, p, &packed), QM_INVALID_ARGUMENT);
  EXPECT_NE(call.error().find("row 40, column 9"), std::string::npos) << call.error();
}

}  // namespace
}  // namespace quantmill::gptq::testing
#endif  // QM_HAVE_CUDA
