#include <algorithm>

#include "tests/core/cpu/support.h"

namespace quantmill::testing {
namespace {

TEST(RouteTopK, AgreesWithF64) {
  struct Case {
    int64_t rows, experts, top_k;
  };
  for (const Case& c : {Case{1, 1, 1}, {5, 8, 2}, {200, 128, 8}, {3, 4, 4}, {0, 8, 2}}) {
    for (bool normalize : {false, true}) {
      const Tensor logits = RandomTensor({c.rows, c.experts}, 1, DType::kF32, 2.0f);
      Tensor weights = Garbage({c.rows, c.top_k});
      const Tensor chosen = SameForAllThreads(
          [&] {
            return Garbage({c.rows, c.top_k}, DType::kI32);
          },
          [&](Backend& backend, Tensor* experts) {
            return backend.RouteTopK(logits, c.top_k, normalize, experts, &weights);
          });
      for (int64_t row = 0; row < c.rows; ++row) {
        std::vector<std::pair<double, int32_t>> p;
        double total = 0, taken = 0;
        for (int64_t e = 0; e < c.experts; ++e) {
          p.emplace_back(-std::exp(static_cast<double>(logits.as<float>()[row * c.experts + e])),
                         e);
          total -= p.back().first;
        }
        std::sort(p.begin(), p.end());
        for (int64_t i = 0; i < c.top_k; ++i) taken -= p[static_cast<size_t>(i)].first;
        for (int64_t i = 0; i < c.top_k; ++i) {
          EXPECT_EQ(chosen.as<int32_t>()[row * c.top_k + i], p[static_cast<size_t>(i)].second);
          const double expected = -p[static_cast<size_t>(i)].first / (normalize ? taken : total);
          EXPECT_NEAR(weights.as<float>()[row * c.top_k + i], expected,
                      SumTolerance(c.experts, expected));
        }
      }
    }
  }
}

TEST(RouteTopK, TiesGoToTheLowestIndex) {
  const Tensor logits = Tensor::FromF32({1, 5}, {1.0f, 2.0f, 2.0f, 1.0f, 2.0f});
  Tensor experts = Garbage({1, 4}, DType::kI32), weights = Garbage({1, 4});
  ASSERT_TRUE(Cpu().RouteTopK(logits, 4, true, &experts, &weights).ok());
  EXPECT_THAT(std::vector<int32_t>(experts.as<int32_t>(), experts.as<int32_t>() + 4),
              ::testing::ElementsAre(1, 2, 4, 0));
}

TEST(RouteTopK, BrokenLogitsStillGiveValidIndices) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const Tensor logits = Tensor::FromF32({1, 4}, {nan, 1.0f, nan, nan});
  Tensor experts = Garbage({1, 3}, DType::kI32), weights = Garbage({1, 3});
  ASSERT_TRUE(Cpu().RouteTopK(logits, 3, true, &experts, &weights).ok());
  EXPECT_THAT(std::vector<int32_t>(experts.as<int32_t>(), experts.as<int32_t>() + 3),
              ::testing::ElementsAre(1, 0, 2));
}

TEST(GatherScatter, MoveRows) {
  const int64_t width = 33;
  const Tensor x = RandomTensor({300, width}, 1);
  std::vector<int32_t> order;
  for (int32_t i = 0; i < 200; ++i) order.push_back((i * 7) % 300);
  const Tensor rows = Tensor::FromI32({200}, order);
  const Tensor gathered = SameForAllThreads(
      [&] {
        return Garbage({200, width});
      },
      [&](Backend& backend, Tensor* out) { return backend.GatherRows(x, rows, out); });
  const Tensor weights = RandomTensor({200}, 2);
  const Tensor start = RandomTensor({300, width}, 3);
  const Tensor scattered =
      SameForAllThreads([&] { return Clone(start); },
                        [&](Backend& backend, Tensor* target) {
                          return backend.ScatterAddRows(gathered, rows, weights, target);
                        });
  std::vector<double> expected = Values(start);
  for (int64_t i = 0; i < 200; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      const int64_t at = order[static_cast<size_t>(i)] * width + j;
      ASSERT_EQ(gathered.as<float>()[i * width + j], x.as<float>()[at]);
      expected[static_cast<size_t>(at)] +=
          static_cast<double>(weights.as<float>()[i]) * x.as<float>()[at];
    }
  }
  for (int64_t i = 0; i < scattered.elements(); ++i) {
    ASSERT_NEAR(scattered.as<float>()[i], expected[static_cast<size_t>(i)], SumTolerance(2, 20.0));
  }
}

TEST(MixtureOfExperts, SaysWhatIsWrong) {
  const Tensor logits = RandomTensor({2, 4}, 1);
  Tensor experts = Garbage({2, 2}, DType::kI32), weights = Garbage({2, 2});
  ExpectInvalid(Cpu().RouteTopK(logits, 0, true, &experts, &weights), "top_k is 0");
  ExpectInvalid(Cpu().RouteTopK(logits, 5, true, &experts, &weights), "expected 1 to 4");
  ExpectInvalid(Cpu().RouteTopK(logits, 2, true, &weights, &weights), "experts_out is F32");
  Tensor out = Garbage({2, 4});
  const Tensor outside = Tensor::FromI32({2}, {0, 2}), inside = Tensor::FromI32({2}, {0, 1});
  ExpectInvalid(Cpu().GatherRows(logits, outside, &out), "rows[1] is 2");
  const Tensor two = RandomTensor({2}, 1);
  ExpectInvalid(Cpu().ScatterAddRows(logits, outside, two, &out), "rows[1] is 2");
  ExpectInvalid(Cpu().ScatterAddRows(logits, inside, RandomTensor({3}, 1), &out),
                "weights has shape [3]");
  ExpectInvalid(Cpu().ScatterAddRows(logits, inside, two, nullptr), "target is null");
}

}  // namespace
}  // namespace quantmill::testing
