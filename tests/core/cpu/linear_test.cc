#include <tuple>

#include "tests/core/cpu/support.h"

namespace quantmill::testing {
namespace {

struct LinearCase {
  int64_t rows, k, n;
};

class LinearTest : public ::testing::TestWithParam<std::tuple<LinearCase, DType, bool>> {};

TEST_P(LinearTest, AgreesWithF64) {
  const auto [shape, dtype, with_bias] = GetParam();
  const auto [rows, k, n] = shape;
  const Tensor x = RandomTensor({rows, k}, 1);
  const Tensor weight = RandomTensor({n, k}, 2, dtype);
  const Tensor bias = with_bias ? RandomTensor({n}, 3, dtype) : Tensor();
  const Tensor out = SameForAllThreads(
      [&] {
        return Garbage({rows, n});
      },
      [&](Backend& backend, Tensor* result) { return backend.Linear(x, weight, bias, result); });
  const std::vector<double> xs = Values(x), ws = Values(weight);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = with_bias ? LoadElement(dtype, bias.data(), j) : 0.0;
      double magnitude = std::fabs(sum);
      for (int64_t l = 0; l < k; ++l) {
        sum += xs[i * k + l] * ws[j * k + l];
        magnitude += std::fabs(xs[i * k + l] * ws[j * k + l]);
      }
      ASSERT_NEAR(out.as<float>()[i * n + j], sum, SumTolerance(k + 1, magnitude))
          << i << ", " << j;
    }
  }
}

std::string CaseName(const ::testing::TestParamInfo<LinearTest::ParamType>& info) {
  const auto& [shape, dtype, with_bias] = info.param;
  return std::to_string(shape.rows) + "x" + std::to_string(shape.k) + "x" +
         std::to_string(shape.n) + "_" + std::string(DTypeName(dtype)) + (with_bias ? "_bias" : "");
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, LinearTest,
    ::testing::Combine(
        ::testing::Values(LinearCase{1, 1, 1}, LinearCase{1, 384, 128}, LinearCase{1, 385, 67},
                          LinearCase{2, 37, 5}, LinearCase{3, 1030, 33}, LinearCase{5, 64, 300},
                          LinearCase{8, 129, 65}, LinearCase{9, 129, 65}, LinearCase{33, 300, 257},
                          LinearCase{300, 65, 131}, LinearCase{257, 520, 17}, LinearCase{0, 8, 4},
                          LinearCase{2, 0, 4}, LinearCase{20, 0, 4}),
        ::testing::Values(DType::kF32, DType::kBF16, DType::kF16), ::testing::Bool()),
    CaseName);

TEST(Linear, ReadsUnalignedWeights) {
  // Tensors in a mapped file start at any even address.
  const int64_t k = 200, n = 9;
  for (int64_t rows : {1, 20}) {
    const Tensor x = RandomTensor({rows, k}, 4);
    const Tensor weight = RandomTensor({n, k}, 5, DType::kBF16);
    std::vector<char> memory(static_cast<size_t>(weight.bytes()) + 2);
    std::memcpy(memory.data() + 2, weight.data(), static_cast<size_t>(weight.bytes()));
    const Tensor shifted(nullptr, memory.data() + 2, DType::kBF16, {n, k}, Device{}, true);
    Tensor expected = Garbage({rows, n}), out = Garbage({rows, n});
    ASSERT_TRUE(Cpu().Linear(x, weight, Tensor(), &expected).ok());
    ASSERT_TRUE(Cpu().Linear(x, shifted, Tensor(), &out).ok());
    EXPECT_TRUE(SameBytes(expected, out));
  }
}

TEST(Linear, SaysWhatIsWrong) {
  const Tensor x = RandomTensor({2, 8}, 1), weight = RandomTensor({4, 8}, 2);
  Tensor out = Garbage({2, 4});
  ExpectInvalid(Cpu().Linear(x, RandomTensor({4, 9}, 2), Tensor(), &out),
                "weight has shape [4, 9]");
  ExpectInvalid(Cpu().Linear(x, RandomTensor({8}, 2), Tensor(), &out), "rank 2");
  ExpectInvalid(Cpu().Linear(x, weight, RandomTensor({5}, 2), &out), "bias has shape [5]");
  ExpectInvalid(Cpu().Linear(x, weight, Tensor(), nullptr), "out is null");
  Tensor narrow = Garbage({2, 3});
  ExpectInvalid(Cpu().Linear(x, weight, Tensor(), &narrow), "out has shape [2, 3]");
  Tensor half = Garbage({2, 4}, DType::kBF16);
  ExpectInvalid(Cpu().Linear(x, weight, Tensor(), &half), "out is BF16, expected F32");
  ExpectInvalid(Cpu().Linear(RandomTensor({2, 8}, 1, DType::kF16), weight, Tensor(), &out),
                "x is F16");
  const Tensor integers = Tensor::FromI32({4, 8}, std::vector<int32_t>(32));
  ExpectInvalid(Cpu().Linear(x, integers, Tensor(), &out), "weight is I32");
  const Tensor remote(nullptr, weight.data(), DType::kF32, {4, 8}, Device{QM_CUDA, 0});
  ExpectInvalid(Cpu().Linear(x, remote, Tensor(), &out), "weight lies on cuda:0");
  Tensor constant(nullptr, out.data(), DType::kF32, {2, 4}, Device{}, true);
  ExpectInvalid(Cpu().Linear(x, weight, Tensor(), &constant), "read-only");
}

TEST(CpuBackend, RefusesANegativeThreadCount) {
  ExpectInvalid(MakeCpuBackend(-1).status(), "threads is -1");
}

TEST(CpuBackend, DescribesItself) {
  EXPECT_TRUE(Cpu().device().is_cpu());
  EXPECT_EQ(Cpu().activation_dtype(), DType::kF32);
  EXPECT_EQ(Cpu().threads().size(), 2);
  EXPECT_EQ(Cpu().stream(), nullptr);
  EXPECT_TRUE(Cpu().Synchronize().ok());
}

}  // namespace
}  // namespace quantmill::testing
