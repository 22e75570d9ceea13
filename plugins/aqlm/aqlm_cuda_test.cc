// The CUDA paths against the CPU paths.
#include <gtest/gtest.h>

#include <tuple>

#include "aqlm_testing.h"

#if defined(QM_HAVE_CUDA)
namespace quantmill::aqlm::testing {
namespace {

using qm::testing::HaveGpu;

class AqlmCuda : public ::testing::TestWithParam<std::tuple<const char*, int64_t, int>> {};

// Sums differ in their order, so a few codes may: both are as good.
TEST_P(AqlmCuda, ReachesTheLossOfTheCpu) {
  if (!HaveGpu()) GTEST_SKIP() << "no GPU";
  Setting s;
  std::tie(s.scheme, s.group_size, s.beam) = GetParam();
  const Problem p = MakeProblem(45, 144, 300, 20);
  FakeCall cpu, gpu({QM_CUDA, 0}), again({QM_CUDA, 0});
  qm_packed a = {}, b = {}, c = {};
  for (FakeCall* call : {&cpu, &gpu, &again}) Apply(s, call);
  ASSERT_EQ(Quantize(cpu, s, p, &a), QM_OK) << cpu.error();
  ASSERT_EQ(Quantize(gpu, s, p, &b), QM_OK) << gpu.error();
  ASSERT_EQ(Quantize(again, s, p, &c), QM_OK) << again.error();
  const std::vector<float> got = Dequantized(gpu, b);
  EXPECT_EQ(got, Dequantized(again, c)) << "the same bytes twice";
  const double want = RelativeLoss(p, Dequantized(cpu, a));
  EXPECT_NEAR(RelativeLoss(p, got), want, 0.1 * want + 1e-6);
}

INSTANTIATE_TEST_SUITE_P(All, AqlmCuda,
                         ::testing::Combine(::testing::Values("2x8", "2x4", "1x6", "1x10", "3x3"),
                                            ::testing::Values<int64_t>(8, 16, 3),
                                            ::testing::Values(1, 3)));

// One search with given codebooks: k-means started from all points is exact on both.
TEST(AqlmCudaSearch, CodesAreThoseOfTheCpu) {
  if (!HaveGpu()) GTEST_SKIP() << "no GPU";
  for (const int beam : {1, 4}) {
    Setting s;
    s.scheme = "1x8";
    s.group_size = 8;
    s.steps = 0;
    s.tolerance = 0.5;
    s.beam = beam;
    const Problem p = MakeProblem(32, 64, 200, 21);  // 256 points, 256 vectors
    FakeCall cpu, gpu({QM_CUDA, 0});
    Apply(s, &cpu);
    Apply(s, &gpu);
    qm_packed a = {}, b = {};
    ASSERT_EQ(Quantize(cpu, s, p, &a), QM_OK) << cpu.error();
    ASSERT_EQ(Quantize(gpu, s, p, &b), QM_OK) << gpu.error();
    const std::vector<int8_t> want = cpu.Read<int8_t>(0, "codes");
    const std::vector<int8_t> got = gpu.Read<int8_t>(0, "codes");
    int64_t different = 0;
    for (size_t i = 0; i < want.size(); ++i) different += want[i] != got[i];
    EXPECT_LE(different, static_cast<int64_t>(want.size() / 50));
  }
}

TEST(AqlmCudaSearch, BadInputIsNamed) {
  if (!HaveGpu()) GTEST_SKIP() << "no GPU";
  Problem p = MakeProblem(20, 64, 100, 22);
  p.w[13 * 64 + 9] = INFINITY;
  FakeCall call({QM_CUDA, 0});
  Apply({}, &call);
  qm_packed packed = {};
  EXPECT_EQ(Quantize(call, {}, p, &packed), QM_INVALID_ARGUMENT);
  EXPECT_NE(call.error().find("row 13, column 9"), std::string::npos) << call.error();
}

// ---- products -----------------------------------------------------------------------------------
struct Shape {
  int64_t out, in;
  Params params;
};
const Shape kShapes[] = {
    {64, 256, {2, 8, 8}},  {4096, 4096, {2, 8, 8}}, {37, 320, {2, 8, 8}}, {24, 64, {2, 8, 8}},
    {50, 1024, {1, 8, 8}}, {50, 512, {1, 8, 16}},   {33, 100, {3, 5, 4}}, {16, 264, {2, 8, 8}},
    {16, 256, {2, 16, 8}}, {6410, 64, {2, 8, 8}},  // more tiles than blocks
};

template <class T>
qm_tensor Upload(FakeCall& call, const std::vector<float>& values, std::vector<int64_t> shape) {
  std::vector<T> stored;
  for (const float v : values) {
    if constexpr (std::is_same_v<T, float>) stored.push_back(v);
    if constexpr (std::is_same_v<T, qm::F16>) stored.push_back(qm::ToF16(v));
    if constexpr (std::is_same_v<T, qm::BF16>) stored.push_back(qm::ToBF16(v));
  }
  return call.Tensor(stored, shape);
}
float Value(float v) { return v; }
float Value(qm::F16 v) { return qm::ToFloat(v); }
float Value(qm::BF16 v) { return qm::ToFloat(v); }

// x and y of type T, codebooks of type C. step: rounding unit of T.
template <class T, class C>
void CompareProducts(double step) {
  const auto& kernel = Ext<qm_linear_kernel>(QM_EXT_LINEAR_KERNEL);
  std::mt19937 engine(7);
  std::normal_distribution<float> normal;
  for (const Shape& s : kShapes) {
    FakeCall gpu({QM_CUDA, 0});
    const std::string json = ParamsJson(s.params);
    const int64_t groups = s.in / s.params.group_size;
    std::vector<int8_t> narrow;
    std::vector<int16_t> wide;
    for (int64_t i = 0; i < s.out * groups * s.params.codebooks; ++i) {
      const int code = static_cast<int>(engine() % s.params.length()) - s.params.length() / 2;
      narrow.push_back(static_cast<int8_t>(code));
      wide.push_back(static_cast<int16_t>(code));
    }
    std::vector<float> books(s.params.values()), scales(s.out);
    for (float& v : books) v = normal(engine);
    for (float& v : scales) v = 0.1f + 0.001f * static_cast<float>(engine() % 100);
    const qm_named_tensor tensors[3] = {
        {"codes", s.params.index_bits <= 8 ? gpu.Tensor(narrow, {s.out, groups, s.params.codebooks})
                                           : gpu.Tensor(wide, {s.out, groups, s.params.codebooks})},
        {"codebooks",
         Upload<C>(gpu, books, {s.params.codebooks, s.params.length(), s.params.group_size})},
        {"scales", Upload<qm::F16>(gpu, scales, {s.out})}};
    const qm_packed packed = {kFormatName, json.c_str(), tensors, 3, s.out, s.in};
    const std::vector<float> w = Dequantized(gpu, packed);

    qm_tensor dense = Upload<T>(gpu, std::vector<float>(s.out * s.in), {s.out, s.in});
    dense.flags = 0;
    ASSERT_EQ(kernel.dequantize(gpu.get(), &packed, &dense), QM_OK) << gpu.error();
    const std::vector<T> dense_values = gpu.Read<T>(dense);
    for (size_t i = 0; i < w.size(); ++i) {
      T want;
      if constexpr (std::is_same_v<T, float>) want = w[i];
      if constexpr (std::is_same_v<T, qm::F16>) want = qm::ToF16(w[i]);
      if constexpr (std::is_same_v<T, qm::BF16>) want = qm::ToBF16(w[i]);
      ASSERT_EQ(Value(dense_values[i]), Value(want)) << json << " element " << i;
    }

    for (const int64_t rows : {1, 2, 7, 8, 9, 16}) {
      std::vector<float> x(rows * s.in);
      for (float& v : x) v = normal(engine);
      const qm_tensor input = Upload<T>(gpu, x, {rows, s.in});
      std::vector<float> rounded;
      for (const T v : gpu.Read<T>(input)) rounded.push_back(Value(v));
      qm_tensor output = Upload<T>(gpu, std::vector<float>(rows * s.out, NAN), {rows, s.out});
      output.flags = 0;
      const qm_status status = kernel.matmul(gpu.get(), &packed, &input, nullptr, &output);
      if (status == QM_UNIMPLEMENTED && rows > 8) continue;
      ASSERT_EQ(status, QM_OK) << gpu.error();
      const std::vector<T> y = gpu.Read<T>(output);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t o = 0; o < s.out; ++o) {
          double sum = 0, size = 0;
          for (int64_t i = 0; i < s.in; ++i) {
            const double term = double{rounded[r * s.in + i]} * w[o * s.in + i];
            sum += term;
            size += std::abs(term);
          }
          // Weights and the result rounded to T, sums in f32.
          const double bound =
              2 * step * (size + std::abs(sum)) + static_cast<double>(s.in) * 0x1p-24 * size + 1e-6;
          ASSERT_NEAR(Value(y[r * s.out + o]), sum, bound)
              << json << " [" << s.out << ", " << s.in << "], rows " << rows << ", row " << r
              << ", output " << o;
        }
      }
    }
  }
}

TEST(AqlmCudaKernel, ProductsInF32) {
  if (!HaveGpu()) GTEST_SKIP() << "no GPU";
  CompareProducts<float, qm::F16>(0x1p-24);
  CompareProducts<float, qm::BF16>(0x1p-24);
}
TEST(AqlmCudaKernel, ProductsInF16) {
  if (!HaveGpu()) GTEST_SKIP() << "no GPU";
  CompareProducts<qm::F16, qm::F16>(0x1p-11);
  CompareProducts<qm::F16, qm::BF16>(0x1p-11);
}
TEST(AqlmCudaKernel, ProductsInBF16) {
  if (!HaveGpu()) GTEST_SKIP() << "no GPU";
  CompareProducts<qm::BF16, qm::F16>(0x1p-8);
  CompareProducts<qm::BF16, qm::BF16>(0x1p-8);
}

}  // namespace
}  // namespace quantmill::aqlm::testing
#endif  // QM_HAVE_CUDA
