#include <algorithm>

#include "tests/core/cpu/support.h"

namespace quantmill::testing {
namespace {

struct AttentionCase {
  std::string name;
  AttentionShape shape;
  int64_t capacity;
  float deviation = 1.0f;  // of queries: large ones make one weight dominate
};

AttentionShape Make(int64_t batch, int64_t queries, int64_t past, int64_t heads, int64_t kv_heads,
                    int64_t head_dim, int64_t window = 0) {
  return {batch,    queries,  past,   heads,
          kv_heads, head_dim, window, 1.0f / std::sqrt(static_cast<float>(head_dim))};
}

class AttentionTest : public ::testing::TestWithParam<AttentionCase> {};

// Softmax attention of one query, straight from its definition, in f64.
std::vector<double> Reference(const AttentionShape& s, const float* q, const float* keys,
                              const float* values, int64_t position) {
  const int64_t stride = s.kv_heads * s.head_dim;
  const int64_t first =
      s.sliding_window > 0 ? std::max<int64_t>(0, position - s.sliding_window + 1) : 0;
  std::vector<double> scores;
  for (int64_t key = first; key <= position; ++key) {
    double dot = 0;
    for (int64_t i = 0; i < s.head_dim; ++i)
      dot += static_cast<double>(q[i]) * keys[key * stride + i];
    scores.push_back(dot * s.scale);
  }
  const double maximum = *std::max_element(scores.begin(), scores.end());
  double total = 0;
  for (double& score : scores) total += score = std::exp(score - maximum);
  std::vector<double> out(static_cast<size_t>(s.head_dim));
  for (int64_t key = first; key <= position; ++key) {
    for (int64_t i = 0; i < s.head_dim; ++i) {
      out[static_cast<size_t>(i)] +=
          scores[static_cast<size_t>(key - first)] / total * values[key * stride + i];
    }
  }
  return out;
}

TEST_P(AttentionTest, AgreesWithF64) {
  const AttentionShape& s = GetParam().shape;
  const int64_t q_width = s.heads * s.head_dim, kv_width = s.kv_heads * s.head_dim;
  const int64_t capacity = GetParam().capacity;
  const Tensor q =
      RandomTensor({s.batch * s.query_length, q_width}, 1, DType::kF32, GetParam().deviation);
  Tensor keys = RandomTensor({s.batch * capacity, kv_width}, 2);
  Tensor values = RandomTensor({s.batch * capacity, kv_width}, 3);
  // Positions beyond the filled ones hold whatever was there before.
  const int64_t filled = s.past_length + s.query_length;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t i = (b * capacity + filled) * kv_width; i < (b + 1) * capacity * kv_width; ++i) {
      keys.as<float>()[i] = values.as<float>()[i] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  const Tensor out = SameForAllThreads([&] { return Garbage(q.shape()); },
                                       [&](Backend& backend, Tensor* result) {
                                         return backend.Attention(s, q, keys, values, result);
                                       });
  // An error d in a score changes its weight by the factor e^d; scores are sums of head_dim terms
  // of magnitude about deviation^2.
  const double score_error =
      SumTolerance(s.head_dim, 2.0 * GetParam().deviation * std::sqrt(s.head_dim));
  const double tolerance = 8 * score_error + SumTolerance(filled, 4.0);
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t i = 0; i < s.query_length; ++i) {
      for (int64_t head = 0; head < s.heads; ++head) {
        const int64_t kv_head = head / (s.heads / s.kv_heads);
        const int64_t row = (b * s.query_length + i) * q_width + head * s.head_dim;
        const int64_t kv = b * capacity * kv_width + kv_head * s.head_dim;
        const std::vector<double> expected =
            Reference(s, q.as<float>() + row, keys.as<float>() + kv, values.as<float>() + kv,
                      s.past_length + i);
        for (int64_t d = 0; d < s.head_dim; ++d) {
          ASSERT_NEAR(out.as<float>()[row + d], expected[static_cast<size_t>(d)], tolerance)
              << "sequence " << b << ", query " << i << ", head " << head << ", element " << d;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, AttentionTest,
    ::testing::Values(AttentionCase{"one", Make(1, 1, 0, 1, 1, 2), 1},
                      AttentionCase{"short", Make(1, 3, 0, 2, 2, 8), 3},
                      AttentionCase{"tile_edges", Make(1, 257, 0, 2, 1, 16), 257},
                      AttentionCase{"grouped", Make(2, 130, 0, 6, 2, 64), 130},
                      AttentionCase{"odd_head_dim", Make(1, 20, 0, 3, 3, 7), 20},
                      AttentionCase{"past", Make(2, 5, 150, 4, 2, 32), 160},
                      AttentionCase{"past_tiles", Make(1, 150, 131, 2, 1, 32), 300},
                      AttentionCase{"window", Make(1, 300, 0, 2, 1, 16, 37), 300},
                      AttentionCase{"window_of_one", Make(1, 10, 0, 1, 1, 8, 1), 10},
                      AttentionCase{"window_past", Make(2, 140, 100, 2, 2, 16, 129), 256},
                      AttentionCase{"generate", Make(1, 1, 700, 6, 2, 64), 1024},
                      AttentionCase{"generate_batch", Make(3, 1, 33, 4, 1, 80), 40},
                      AttentionCase{"generate_window", Make(1, 1, 700, 4, 4, 64, 100), 701},
                      AttentionCase{"generate_few", Make(1, 4, 300, 6, 3, 128), 512},
                      AttentionCase{"peaked", Make(1, 200, 0, 2, 1, 64), 200, 40.0f}),
    [](const ::testing::TestParamInfo<AttentionCase>& info) { return info.param.name; });

TEST(Attention, NoQueriesDoNothing) {
  Tensor out = Garbage({0, 16});
  EXPECT_TRUE(Cpu()
                  .Attention(Make(1, 0, 2, 2, 1, 8), RandomTensor({0, 16}, 1),
                             RandomTensor({4, 8}, 2), RandomTensor({4, 8}, 3), &out)
                  .ok());
}

TEST(Attention, SaysWhatIsWrong) {
  const Tensor q = RandomTensor({4, 16}, 1), kv = RandomTensor({4, 8}, 2);
  Tensor out = Garbage({4, 16});
  const AttentionShape good = Make(1, 4, 0, 2, 1, 8);
  EXPECT_TRUE(Cpu().Attention(good, q, kv, kv, &out).ok());
  AttentionShape s = good;
  s.past_length = 1;
  ExpectInvalid(Cpu().Attention(s, q, kv, kv, &out), "keys hold 4 positions");
  s = good;
  s.kv_heads = 3;
  ExpectInvalid(Cpu().Attention(s, q, kv, kv, &out), "must divide heads");
  s = good;
  s.batch = 0;
  ExpectInvalid(Cpu().Attention(s, q, kv, kv, &out), "batch must be positive");
  s = good;
  s.sliding_window = -1;
  ExpectInvalid(Cpu().Attention(s, q, kv, kv, &out), "sliding_window");
  s = good;
  s.head_dim = 0;
  ExpectInvalid(Cpu().Attention(s, q, kv, kv, &out), "head_dim");
  ExpectInvalid(Cpu().Attention(good, kv, kv, kv, &out), "q has shape [4, 8]");
  ExpectInvalid(Cpu().Attention(good, q, kv, RandomTensor({3, 8}, 2), &out), "values has shape");
}

}  // namespace
}  // namespace quantmill::testing
