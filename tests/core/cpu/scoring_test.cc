#include <algorithm>

#include "tests/core/cpu/support.h"

namespace quantmill::testing {
namespace {

double LogSumExp(const float* row, int64_t n) {
  const double maximum = *std::max_element(row, row + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(row[i] - maximum);
  return maximum + std::log(sum);
}

TEST(ScoreRows, AgreesWithF64) {
  struct Case {
    int64_t rows, vocab;
  };
  for (const Case& c : {Case{1, 1}, {7, 37}, {3, 8192}, {2, 32003}, {0, 5}}) {
    const Tensor logits = RandomTensor({c.rows, c.vocab}, 1, DType::kF32, 5.0f);
    std::vector<int32_t> wanted;
    for (int64_t i = 0; i < c.rows; ++i) {
      wanted.push_back(static_cast<int32_t>((i * 31) % c.vocab));
    }
    const Tensor targets = Tensor::FromI32({c.rows}, wanted);
    Tensor argmax = Garbage({c.rows}, DType::kI32);
    const Tensor nll = SameForAllThreads([&] { return Garbage({c.rows}); },
                                         [&](Backend& backend, Tensor* out) {
                                           return backend.ScoreRows(logits, targets, out, &argmax);
                                         });
    for (int64_t row = 0; row < c.rows; ++row) {
      const float* values = logits.as<float>() + row * c.vocab;
      const double expected = LogSumExp(values, c.vocab) - values[wanted[static_cast<size_t>(row)]];
      // Exponentials off by a few units in the last place, and one rounding of the result.
      EXPECT_NEAR(nll.as<float>()[row], expected, 8 * kEpsilon + kEpsilon * std::fabs(expected));
      EXPECT_EQ(argmax.as<int32_t>()[row], std::max_element(values, values + c.vocab) - values);
    }
  }
}

TEST(ScoreRows, ArgmaxIsTheLowestIndexOnTies) {
  std::vector<float> values(100, -1.0f);
  for (size_t at : {97u, 41u, 42u, 88u}) values[at] = 3.0f;
  const Tensor logits = Tensor::FromF32({1, 100}, values);
  Tensor nll = Garbage({1}), argmax = Garbage({1}, DType::kI32);
  ASSERT_TRUE(Cpu().ScoreRows(logits, Tensor::FromI32({1}, {0}), &nll, &argmax).ok());
  EXPECT_EQ(argmax.as<int32_t>()[0], 41);
}

TEST(ScoreRows, ExtremeAndBrokenLogits) {
  const float inf = std::numeric_limits<float>::infinity();
  const Tensor logits =
      Tensor::FromF32({3, 3}, {1e4f, -1e4f, 1e4f, -inf, 0.0f, -inf, 0.0f, std::nanf(""), 1.0f});
  Tensor nll = Garbage({3}), argmax = Garbage({3}, DType::kI32);
  ASSERT_TRUE(Cpu().ScoreRows(logits, Tensor::FromI32({3}, {1, 1, 2}), &nll, &argmax).ok());
  EXPECT_NEAR(nll.as<float>()[0], 2e4 + std::log(2.0), 2e4 * kEpsilon);
  EXPECT_EQ(nll.as<float>()[1], 0.0f);
  // A NaN anywhere in the row must be seen in its score, and the index stays a valid one.
  EXPECT_TRUE(std::isnan(nll.as<float>()[2]));
  EXPECT_GE(argmax.as<int32_t>()[2], 0);
  EXPECT_LT(argmax.as<int32_t>()[2], 3);
}

TEST(KlRows, AgreesWithF64) {
  struct Case {
    int64_t rows, vocab;
    float difference;
  };
  for (const Case& c : {Case{1, 1, 1.0f},
                        {5, 37, 1.0f},
                        {3, 8192, 0.3f},
                        {2, 32003, 0.01f},
                        {2, 32003, 1e-3f},
                        {2, 500, 30.0f}}) {
    const Tensor reference = RandomTensor({c.rows, c.vocab}, 1, DType::kF32, 3.0f);
    const Tensor noise = RandomTensor({c.rows, c.vocab}, 2, DType::kF32, c.difference);
    Tensor logits = Clone(reference);
    for (int64_t i = 0; i < logits.elements(); ++i) logits.as<float>()[i] += noise.as<float>()[i];
    const Tensor kl = SameForAllThreads(
        [&] { return Garbage({c.rows}); },
        [&](Backend& backend, Tensor* out) { return backend.KlRows(reference, logits, out); });
    for (int64_t row = 0; row < c.rows; ++row) {
      const float* p = reference.as<float>() + row * c.vocab;
      const float* q = logits.as<float>() + row * c.vocab;
      const double p_sum = LogSumExp(p, c.vocab), q_sum = LogSumExp(q, c.vocab);
      double expected = 0;
      for (int64_t v = 0; v < c.vocab; ++v) {
        expected += std::exp(p[v] - p_sum) * ((p[v] - p_sum) - (q[v] - q_sum));
      }
      // Rounding p - q moves every log ratio by epsilon times the logits (about 16 here), which
      // counts with the size of the ratios; everything else is relative to the result.
      EXPECT_NEAR(kl.as<float>()[row], expected,
                  64 * kEpsilon * expected + 16 * kEpsilon * c.difference * c.difference);
    }
  }
}

TEST(KlRows, IdenticalLogitsGiveZero) {
  for (int64_t vocab : {37, 8192, 128256}) {
    const Tensor logits = RandomTensor({2, vocab}, 1, DType::kF32, 6.0f);
    Tensor kl = Garbage({2});
    ASSERT_TRUE(Cpu().KlRows(logits, logits, &kl).ok());
    EXPECT_NEAR(kl.as<float>()[0], 0.0, 1e-7);
    EXPECT_NEAR(kl.as<float>()[1], 0.0, 1e-7);
  }
}

TEST(KlRows, IgnoresAShiftOfAllLogits) {
  const Tensor reference = RandomTensor({1, 4096}, 1, DType::kF32, 3.0f);
  Tensor logits = Clone(reference);
  for (int64_t i = 0; i < 4096; ++i) logits.as<float>()[i] += 8.0f;
  Tensor kl = Garbage({1});
  ASSERT_TRUE(Cpu().KlRows(reference, logits, &kl).ok());
  // Adding 8 rounds each logit by up to half a unit in the last place of 16.
  EXPECT_NEAR(kl.as<float>()[0], 0.0, 1e-6);
}

TEST(KlRows, ImpossibleTokensCountNothing) {
  const float inf = std::numeric_limits<float>::infinity();
  const Tensor reference = Tensor::FromF32({1, 3}, {0.0f, 0.0f, -inf});
  const Tensor logits = Tensor::FromF32({1, 3}, {0.0f, 0.0f, -inf});
  Tensor kl = Garbage({1});
  ASSERT_TRUE(Cpu().KlRows(reference, logits, &kl).ok());
  EXPECT_NEAR(kl.as<float>()[0], 0.0, 1e-7);
}

TEST(KlRows, ProbabilitiesThatVanish) {
  // p = (1, e^-300), q = (1/2, 1/2): log 2. The second p is 0 in f32, its q is not.
  Tensor kl = Garbage({1});
  ASSERT_TRUE(Cpu()
                  .KlRows(Tensor::FromF32({1, 2}, {300.0f, 0.0f}),
                          Tensor::FromF32({1, 2}, {0.0f, 0.0f}), &kl)
                  .ok());
  EXPECT_NEAR(kl.as<float>()[0], std::log(2.0), 4 * kEpsilon);
  // The other way round the second token costs 1/2 (log 1/2 + 300).
  ASSERT_TRUE(Cpu()
                  .KlRows(Tensor::FromF32({1, 2}, {0.0f, 0.0f}),
                          Tensor::FromF32({1, 2}, {300.0f, 0.0f}), &kl)
                  .ok());
  EXPECT_NEAR(kl.as<float>()[0], 150 - std::log(2.0), 150 * 4 * kEpsilon);
}

TEST(KlRows, ShowsBrokenLogits) {
  const Tensor good = Tensor::FromF32({1, 2}, {0.0f, 1.0f});
  const Tensor bad = Tensor::FromF32({1, 2}, {0.0f, std::nanf("")});
  Tensor kl = Garbage({1});
  ASSERT_TRUE(Cpu().KlRows(bad, good, &kl).ok());
  EXPECT_TRUE(std::isnan(kl.as<float>()[0]));
  ASSERT_TRUE(Cpu().KlRows(good, bad, &kl).ok());
  EXPECT_TRUE(std::isnan(kl.as<float>()[0]));
  const float inf = std::numeric_limits<float>::infinity();
  ASSERT_TRUE(Cpu().KlRows(good, Tensor::FromF32({1, 2}, {0.0f, -inf}), &kl).ok());
  EXPECT_EQ(kl.as<float>()[0], inf);
}

TEST(Scoring, SaysWhatIsWrong) {
  const Tensor logits = RandomTensor({2, 4}, 1);
  Tensor nll = Garbage({2}), argmax = Garbage({2}, DType::kI32);
  ExpectInvalid(Cpu().ScoreRows(logits, Tensor::FromI32({2}, {0, 4}), &nll, &argmax),
                "targets[1] is 4");
  ExpectInvalid(Cpu().ScoreRows(logits, Tensor::FromI32({3}, {0, 1, 2}), &nll, &argmax),
                "targets has shape [3]");
  ExpectInvalid(
      Cpu().ScoreRows(RandomTensor({2, 0}, 1), Tensor::FromI32({2}, {0, 0}), &nll, &argmax),
      "no columns");
  ExpectInvalid(Cpu().KlRows(RandomTensor({2, 5}, 1), logits, &nll), "reference has shape [2, 5]");
  ExpectInvalid(Cpu().KlRows(RandomTensor({2, 0}, 1), RandomTensor({2, 0}, 1), &nll), "no columns");
}

}  // namespace
}  // namespace quantmill::testing
