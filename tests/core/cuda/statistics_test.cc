// Calibration statistics, CUDA against the CPU.
#include "tests/core/cuda/support.h"

namespace quantmill::testing {
namespace {

class CudaStatisticsTest : public CudaTest {};
QM_CUDA_TEST_SUITE(CudaStatisticsTest);

void ExpectSymmetric(const Tensor& matrix) {
  const int64_t n = matrix.dim(0);
  const float* values = matrix.as<float>();
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) ASSERT_EQ(values[i * n + j], values[j * n + i]);
  }
}

TEST_P(CudaStatisticsTest, GramAddsProductsInF32) {
  for (const auto& [rows, k] : std::vector<std::pair<int64_t, int64_t>>{
           {1, 1}, {5, 33}, {100, 64}, {257, 129}, {64, 384}}) {
    const Tensor start = RandomTensor({k, k}, 9);
    Tensor symmetric = Garbage({k, k});
    QM_ASSERT_OK(Cpu().Gemm(false, true, 1, start.View(), start.View(), 0, symmetric.View()));
    const Tensor x = Random({rows, k}, 1);
    Tensor expected = Clone(symmetric);
    QM_ASSERT_OK(Cpu().AccumulateGram(InF32(x), &expected));
    Tensor gram = OnGpu(symmetric);
    QM_ASSERT_OK(cuda().AccumulateGram(OnGpu(x), &gram));
    const Tensor result = OnHost(gram);
    ExpectWithin(result, expected, [&](int64_t i) {
      return 2 * SumTolerance(rows, 3.0 * static_cast<double>(rows)) +
             4 * kEpsilon * std::fabs(symmetric.as<float>()[i]);
    });
    ExpectSymmetric(result);
  }
}

// Above one panel only the panels up to the diagonal are computed and the rest is mirrored.
TEST_P(CudaStatisticsTest, GramOfManyFeatures) {
  constexpr int64_t k = 2048 + 65, rows = 40;
  const Tensor x = Random({rows, k}, 1);
  Tensor expected = Tensor::HostZeros(DType::kF32, {k, k}).value();
  QM_ASSERT_OK(Cpu().AccumulateGram(InF32(x), &expected));
  Tensor gram = Poisoned({k, k}, DType::kF32);
  QM_ASSERT_OK(cuda().Zero(&gram));
  QM_ASSERT_OK(cuda().AccumulateGram(OnGpu(x), &gram));
  const Tensor result = OnHost(gram);
  ExpectWithin(result, expected, 2 * SumTolerance(rows, 3.0 * rows));
  ExpectSymmetric(result);
}

TEST_P(CudaStatisticsTest, CrossKeepsSmallDifferences) {
  for (const auto& [rows, k] :
       std::vector<std::pair<int64_t, int64_t>>{{3, 5}, {120, 65}, {64, 256}}) {
    const Tensor x = Random({rows, k}, 1);
    // An original that differs from x by a percent, as after quantization.
    Tensor original = Garbage({rows, k}, dtype());
    const Tensor noise = RandomTensor({rows, k}, 2, DType::kF32, 0.01f);
    for (int64_t i = 0; i < x.elements(); ++i) {
      StoreElement(dtype(), LoadElement(dtype(), x.data(), i) * (1 + noise.as<float>()[i]),
                   original.data(), i);
    }
    Tensor expected = Tensor::HostZeros(DType::kF32, {k, k}).value();
    QM_ASSERT_OK(Cpu().AccumulateCross(InF32(original), InF32(x), &expected));
    Tensor cross = Poisoned({k, k}, DType::kF32);
    QM_ASSERT_OK(cuda().Zero(&cross));
    QM_ASSERT_OK(cuda().AccumulateCross(OnGpu(original), OnGpu(x), &cross));
    // The bound is that of the small differences, not of the rows themselves.
    const double difference = 0.02;
    ExpectWithin(OnHost(cross), expected, 4 * SumTolerance(rows, difference * 3.0 * rows));
  }
}

TEST_P(CudaStatisticsTest, CrossOfEqualRowsIsZero) {
  const Tensor x = OnGpu(Random({50, 32}, 1));
  Tensor cross = Poisoned({32, 32}, DType::kF32);
  QM_ASSERT_OK(cuda().Zero(&cross));
  QM_ASSERT_OK(cuda().AccumulateCross(x, x, &cross));
  for (double value : Values(OnHost(cross))) EXPECT_EQ(value, 0);
}

TEST_P(CudaStatisticsTest, AbsoluteSumAndMaximum) {
  for (const auto& [rows, k] :
       std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {64, 130}, {65, 33}, {1000, 384}}) {
    const Tensor x = Random({rows, k}, 1);
    const Tensor sum_start = Abs(RandomTensor({k}, 2));
    const Tensor max_start = Abs(RandomTensor({k}, 3));
    Tensor expected_sum = Clone(sum_start), expected_max = Clone(max_start);
    QM_ASSERT_OK(Cpu().AccumulateAbs(InF32(x), &expected_sum, &expected_max));
    Tensor sum = OnGpu(sum_start), maximum = OnGpu(max_start);
    QM_ASSERT_OK(cuda().AccumulateAbs(OnGpu(x), &sum, &maximum));
    ExpectWithin(OnHost(sum), expected_sum, 2 * SumTolerance(rows, static_cast<double>(rows)));
    EXPECT_TRUE(SameBytes(OnHost(maximum), expected_max));
    Tensor only_sum = OnGpu(sum_start), only_max = OnGpu(max_start);
    QM_ASSERT_OK(cuda().AccumulateAbs(OnGpu(x), &only_sum, nullptr));
    QM_ASSERT_OK(cuda().AccumulateAbs(OnGpu(x), nullptr, &only_max));
    EXPECT_TRUE(SameBytes(OnHost(only_sum), OnHost(sum)));
    EXPECT_TRUE(SameBytes(OnHost(only_max), OnHost(maximum)));
  }
}

TEST_P(CudaStatisticsTest, NoRowsChangeNothing) {
  const Tensor none = OnGpu(Random({0, 4}, 1));
  const Tensor start = RandomTensor({4, 4}, 2);
  Tensor gram = OnGpu(start), cross = OnGpu(start), sum = OnGpu(start.Rows(0, 1).Reshaped({4}));
  QM_ASSERT_OK(cuda().AccumulateGram(none, &gram));
  QM_ASSERT_OK(cuda().AccumulateCross(none, none, &cross));
  QM_ASSERT_OK(cuda().AccumulateAbs(none, &sum, nullptr));
  EXPECT_TRUE(SameBytes(OnHost(gram), start));
  EXPECT_TRUE(SameBytes(OnHost(cross), start));
}

TEST_P(CudaStatisticsTest, RefusesWhatDoesNotFit) {
  const Tensor x = OnGpu(Random({3, 4}, 1));
  Tensor wrong = Poisoned({4, 5}, DType::kF32);
  ExpectInvalid(cuda().AccumulateGram(x, &wrong), "gram has shape");
  ExpectInvalid(cuda().AccumulateCross(x, x, &wrong), "cross has shape");
  ExpectInvalid(cuda().AccumulateAbs(x, &wrong, nullptr), "sum has shape");
}

}  // namespace
}  // namespace quantmill::testing
