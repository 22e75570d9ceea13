#include "tests/core/cpu/support.h"

namespace quantmill::testing {
namespace {

struct StatisticsCase {
  int64_t rows, k;
};
constexpr StatisticsCase kCases[] = {{1, 1},     {1, 37},   {5, 130},   {300, 65},
                                     {129, 384}, {3, 1200}, {1100, 20}, {0, 9}};

// start + a^T b, with the tolerance of every element.
void ExpectTransposedProduct(const Tensor& a, const Tensor& b, const Tensor& start,
                             const Tensor& result) {
  const int64_t rows = a.dim(0), k = a.dim(1);
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      double sum = start.as<float>()[i * k + j], magnitude = std::fabs(sum);
      for (int64_t r = 0; r < rows; ++r) {
        const double term =
            static_cast<double>(a.as<float>()[r * k + i]) * b.as<float>()[r * k + j];
        sum += term;
        magnitude += std::fabs(term);
      }
      ASSERT_NEAR(result.as<float>()[i * k + j], sum, SumTolerance(rows + 1, magnitude))
          << i << ", " << j;
    }
  }
}

TEST(AccumulateGram, AgreesWithF64AndIsSymmetric) {
  for (const StatisticsCase& c : kCases) {
    const Tensor x = RandomTensor({c.rows, c.k}, 1);
    Tensor start = Tensor::HostZeros(DType::kF32, {c.k, c.k}).value();
    ASSERT_TRUE(Cpu().AccumulateGram(RandomTensor({3, c.k}, 2), &start).ok());
    const Tensor gram = SameForAllThreads(
        [&] { return Clone(start); },
        [&](Backend& backend, Tensor* out) { return backend.AccumulateGram(x, out); });
    ExpectTransposedProduct(x, x, start, gram);
    for (int64_t i = 0; i < c.k; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        ASSERT_EQ(gram.as<float>()[i * c.k + j], gram.as<float>()[j * c.k + i]);
      }
    }
  }
}

TEST(AccumulateCross, AgreesWithF64) {
  for (const StatisticsCase& c : kCases) {
    const Tensor x = RandomTensor({c.rows, c.k}, 1), original = RandomTensor({c.rows, c.k}, 2);
    const Tensor start = RandomTensor({c.k, c.k}, 3);
    const Tensor cross = SameForAllThreads(
        [&] { return Clone(start); },
        [&](Backend& backend, Tensor* out) { return backend.AccumulateCross(original, x, out); });
    Tensor difference = Clone(original);
    for (int64_t i = 0; i < x.elements(); ++i) difference.as<float>()[i] -= x.as<float>()[i];
    ExpectTransposedProduct(difference, x, start, cross);
  }
}

TEST(AccumulateAbs, AgreesWithF64) {
  for (const StatisticsCase& c : kCases) {
    const Tensor x = RandomTensor({c.rows, c.k}, 1);
    const Tensor start = Tensor::FromF32({c.k}, std::vector<float>(static_cast<size_t>(c.k), 1.5f));
    const Tensor sum = SameForAllThreads(
        [&] { return Clone(start); },
        [&](Backend& backend, Tensor* out) { return backend.AccumulateAbs(x, out, nullptr); });
    const Tensor maximum = SameForAllThreads(
        [&] { return Clone(start); },
        [&](Backend& backend, Tensor* out) { return backend.AccumulateAbs(x, nullptr, out); });
    Tensor both_sum = Clone(start), both_maximum = Clone(start);
    ASSERT_TRUE(Cpu().AccumulateAbs(x, &both_sum, &both_maximum).ok());
    EXPECT_TRUE(SameBytes(sum, both_sum));
    EXPECT_TRUE(SameBytes(maximum, both_maximum));
    for (int64_t j = 0; j < c.k; ++j) {
      double expected = 1.5;
      float largest = 1.5f;
      for (int64_t r = 0; r < c.rows; ++r) {
        expected += std::fabs(x.as<float>()[r * c.k + j]);
        largest = std::max(largest, std::fabs(x.as<float>()[r * c.k + j]));
      }
      EXPECT_NEAR(sum.as<float>()[j], expected, SumTolerance(c.rows + 1, expected));
      EXPECT_EQ(maximum.as<float>()[j], largest);
    }
  }
}

TEST(Statistics, SayWhatIsWrong) {
  const Tensor x = RandomTensor({3, 4}, 1);
  Tensor wrong = Garbage({4, 5}), good = Garbage({4, 4}), vector = Garbage({5});
  ExpectInvalid(Cpu().AccumulateGram(x, &wrong), "gram has shape [4, 5]");
  ExpectInvalid(Cpu().AccumulateGram(x, nullptr), "gram is null");
  ExpectInvalid(Cpu().AccumulateGram(RandomTensor({4}, 1), &good), "rows and features");
  ExpectInvalid(Cpu().AccumulateCross(RandomTensor({2, 4}, 1), x, &good), "x_original has shape");
  ExpectInvalid(Cpu().AccumulateAbs(x, &vector, nullptr), "sum has shape [5]");
  ExpectInvalid(Cpu().AccumulateAbs(x, nullptr, &vector), "maximum has shape [5]");
}

}  // namespace
}  // namespace quantmill::testing
