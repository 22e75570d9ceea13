// Scoring of logits, CUDA against sums in f64 and against the CPU.
#include "tests/core/cuda/support.h"

namespace quantmill::testing {
namespace {

class CudaScoringTest : public CudaTest {};
QM_CUDA_TEST_SUITE(CudaScoringTest);

double LogSumExp(const std::vector<double>& values, int64_t begin, int64_t count) {
  double largest = -INFINITY;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, values[begin + i]);
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += std::exp(values[begin + i] - largest);
  return largest + std::log(sum);
}

TEST_P(CudaScoringTest, ScoresRows) {
  for (const auto& [rows, vocab] :
       std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {3, 7}, {5, 511}, {4, 2048}, {2, 50257}}) {
    const Tensor logits = Random({rows, vocab}, 1, 4.0f);
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < rows; ++i) ids.push_back(static_cast<int32_t>((i * 7919) % vocab));
    const Tensor targets = Tensor::FromI32({rows}, ids);
    Tensor nll = Garbage({rows}), argmax = Garbage({rows}, DType::kI32);
    QM_ASSERT_OK(cuda().ScoreRows(OnGpu(logits), targets, &nll, &argmax));
    Tensor cpu_nll = Garbage({rows}), cpu_argmax = Garbage({rows}, DType::kI32);
    QM_ASSERT_OK(Cpu().ScoreRows(InF32(logits), targets, &cpu_nll, &cpu_argmax));
    EXPECT_TRUE(SameBytes(argmax, cpu_argmax));
    const std::vector<double> values = Values(logits);
    for (int64_t i = 0; i < rows; ++i) {
      const double expected =
          LogSumExp(values, i * vocab, vocab) - values[i * vocab + ids[static_cast<size_t>(i)]];
      // One exponential has a relative error of 2 ulp; the result is rounded to f32.
      EXPECT_NEAR(nll.as<float>()[i], expected, 4 * kEpsilon * (1 + std::fabs(expected)));
    }
  }
}

TEST_P(CudaScoringTest, ArgmaxTakesTheLowestIndexOfEqualLogits) {
  Tensor logits = Garbage({2, 3000}, dtype());
  for (int64_t i = 0; i < 6000; ++i) StoreElement(dtype(), 1.0f, logits.data(), i);
  for (int64_t i : {700, 100, 2999, 5500, 3001}) StoreElement(dtype(), 2.0f, logits.data(), i);
  Tensor nll = Garbage({2}), argmax = Garbage({2}, DType::kI32);
  QM_ASSERT_OK(cuda().ScoreRows(OnGpu(logits), Tensor::FromI32({2}, {0, 0}), &nll, &argmax));
  EXPECT_EQ(argmax.as<int32_t>()[0], 100);
  EXPECT_EQ(argmax.as<int32_t>()[1], 1);
}

TEST_P(CudaScoringTest, KlAgainstF64) {
  for (const auto& [rows, vocab] :
       std::vector<std::pair<int64_t, int64_t>>{{1, 2}, {4, 513}, {3, 8192}, {2, 50257}}) {
    const Tensor reference = RandomTensor({rows, vocab}, 1, DType::kF32, 3.0f);
    const Tensor logits = Random({rows, vocab}, 2, 3.0f);
    Tensor kl = Garbage({rows});
    QM_ASSERT_OK(cuda().KlRows(OnGpu(reference), OnGpu(logits), &kl));
    const std::vector<double> a = Values(reference), b = Values(logits);
    for (int64_t i = 0; i < rows; ++i) {
      const double lse_a = LogSumExp(a, i * vocab, vocab);
      const double lse_b = LogSumExp(b, i * vocab, vocab);
      double expected = 0, magnitude = 0;
      for (int64_t v = i * vocab; v < (i + 1) * vocab; ++v) {
        const double p = std::exp(a[v] - lse_a);
        expected += p * ((a[v] - lse_a) - (b[v] - lse_b));
        magnitude += p * std::fabs((a[v] - lse_a) - (b[v] - lse_b));
      }
      EXPECT_NEAR(kl.as<float>()[i], expected, 32 * kEpsilon * (1 + magnitude));
    }
  }
}

TEST_P(CudaScoringTest, KlOfIdenticalRowsIsZero) {
  const Tensor logits = OnGpu(Random({3, 32000}, 1, 5.0f));
  Tensor kl = Garbage({3});
  QM_ASSERT_OK(cuda().KlRows(logits, logits, &kl));
  for (double value : Values(kl)) EXPECT_LT(std::fabs(value), 1e-7);
}

TEST_P(CudaScoringTest, KlOfAlmostEqualRowsIsSmallAndRight) {
  constexpr int64_t vocab = 32000;
  const Tensor a = RandomTensor({1, vocab}, 1, DType::kF32, 2.0f);
  const Tensor noise = RandomTensor({1, vocab}, 2, DType::kF32, 1e-2f);
  Tensor b = Clone(a);
  for (int64_t i = 0; i < vocab; ++i) b.as<float>()[i] += noise.as<float>()[i];
  Tensor kl = Garbage({1}), expected = Garbage({1});
  QM_ASSERT_OK(cuda().KlRows(OnGpu(a), OnGpu(b), &kl));
  QM_ASSERT_OK(Cpu().KlRows(a, b, &expected));
  EXPECT_NEAR(kl.as<float>()[0], expected.as<float>()[0], 3e-7);
  EXPECT_NEAR(kl.as<float>()[0], 5e-5, 2e-5);  // half the variance of the noise
}

TEST_P(CudaScoringTest, RefusesWhatDoesNotFit) {
  const Tensor logits = OnGpu(Random({2, 5}, 1));
  Tensor nll = Garbage({2}), argmax = Garbage({2}, DType::kI32);
  ExpectInvalid(cuda().ScoreRows(logits, Tensor::FromI32({2}, {0, 5}), &nll, &argmax),
                "targets[1] is 5");
  ExpectInvalid(cuda().ScoreRows(logits, Tensor::FromI32({3}, {0, 1, 2}), &nll, &argmax),
                "targets has shape");
  ExpectInvalid(cuda().KlRows(logits, OnGpu(Random({2, 6}, 1)), &nll), "logits has shape");
}

}  // namespace
}  // namespace quantmill::testing
