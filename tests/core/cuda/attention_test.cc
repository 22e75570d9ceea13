// Attention, CUDA against the CPU: the tensor-core, decoding and plain kernels.
#include "core/cuda/attention.cuh"

#include "tests/core/cuda/support.h"

namespace quantmill::testing {
namespace {

class CudaAttentionTest : public CudaTest {
 protected:
  void Check(const AttentionShape& s, int64_t spare = 0) {
    SCOPED_TRACE(::testing::Message()
                 << "batch " << s.batch << " queries " << s.query_length << " past "
                 << s.past_length << " heads " << s.heads << "/" << s.kv_heads << " dim "
                 << s.head_dim << " window " << s.sliding_window);
    const int64_t capacity = s.past_length + s.query_length + spare;
    const Tensor q = Random({s.batch * s.query_length, s.heads * s.head_dim}, 1);
    Tensor keys = Random({s.batch * capacity, s.kv_heads * s.head_dim}, 2);
    Tensor values = Random({s.batch * capacity, s.kv_heads * s.head_dim}, 3);
    // What lies beyond the filled positions must not matter.
    for (int64_t b = 0; b < s.batch; ++b) {
      for (Tensor* tensor : {&keys, &values}) {
        const Tensor rest = tensor->Rows((b + 1) * capacity - spare, (b + 1) * capacity);
        std::memset(rest.data(), 0xFF, static_cast<size_t>(rest.bytes()));
      }
    }
    Tensor expected = Garbage(q.shape());
    QM_ASSERT_OK(Cpu().Attention(s, InF32(q), InF32(keys), InF32(values), &expected));
    Tensor out = Poisoned(q.shape());
    QM_ASSERT_OK(cuda().Attention(s, OnGpu(q), OnGpu(keys), OnGpu(values), &out));
    ExpectWithin(OnHost(out), expected, Bound(s));
    Tensor again = Poisoned(q.shape());
    QM_ASSERT_OK(cuda().Attention(s, OnGpu(q), OnGpu(keys), OnGpu(values), &again));
    EXPECT_TRUE(SameBytes(OnHost(again), OnHost(out))) << "two runs differ";
  }

  // Error of sum_j p_j v_j for standard normal q, k, v: a score has an absolute error e_s, so p has
  // a relative one of 2 e_s (itself and the sum); p is rounded to 16 bits on the tensor cores;
  // exponentials are good to 2^-22; |v| stays below 6.
  double Bound(const AttentionShape& s) const {
    const auto dim = static_cast<double>(s.head_dim);
    const double score = 2 * SumTolerance(s.head_dim, s.scale * 2 * dim);
    const double p = dtype() == DType::kF32 ? 0 : UnitRoundoff(dtype());
    const double sum = SumTolerance(s.past_length + s.query_length, 1);
    return 6 * (2 * score + p + 2 * sum + 0x1p-20);
  }

  static AttentionShape Make(int64_t batch, int64_t queries, int64_t past, int64_t heads,
                             int64_t kv_heads, int64_t head_dim, int64_t window = 0) {
    return {batch,    queries,  past,   heads,
            kv_heads, head_dim, window, 1.0f / std::sqrt(static_cast<float>(head_dim))};
  }
};
QM_CUDA_TEST_SUITE(CudaAttentionTest);

TEST_P(CudaAttentionTest, EveryHeadSize) {
  for (int64_t head_dim : {2, 16, 31, 32, 48, 64, 80, 96, 112, 128, 160, 256}) {
    Check(Make(1, 70, 0, 2, 1, head_dim));
  }
}

TEST_P(CudaAttentionTest, LengthsAroundTheTiles) {
  for (int64_t length : {2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200}) {
    Check(Make(1, length, 0, 1, 1, 64));
  }
}

TEST_P(CudaAttentionTest, GroupsOfHeads) {
  for (const auto& [heads, kv_heads] :
       std::vector<std::pair<int64_t, int64_t>>{{4, 4}, {4, 2}, {6, 2}, {7, 1}, {8, 1}, {12, 4}}) {
    Check(Make(1, 40, 0, heads, kv_heads, 32));
    Check(Make(1, 1, 77, heads, kv_heads, 32));
  }
}

TEST_P(CudaAttentionTest, BatchesPastAndCapacity) {
  Check(Make(3, 50, 0, 4, 2, 64));
  Check(Make(2, 33, 70, 4, 2, 128), 19);
  Check(Make(2, 5, 300, 2, 2, 80), 1);
  Check(Make(3, 1, 129, 4, 2, 64), 7);
}

TEST_P(CudaAttentionTest, SlidingWindow) {
  for (int64_t window : {1, 5, 16, 63, 64, 65, 100, 1000}) {
    Check(Make(1, 200, 0, 2, 1, 64, window));
    Check(Make(2, 40, 150, 2, 1, 32, window));
    Check(Make(1, 1, 300, 2, 1, 64, window));
    Check(Make(1, 90, 20, 1, 1, 48, window));
  }
}

TEST_P(CudaAttentionTest, DecodingOverManyKeys) {
  for (int64_t past : {0, 1, 3, 4, 5, 15, 16, 17, 126, 127, 128, 129, 1000}) {
    Check(Make(1, 1, past, 6, 2, 64));
  }
  for (int64_t head_dim : {2, 30, 34, 64, 66, 80, 96, 128, 130, 256}) {
    Check(Make(2, 1, 140, 5, 1, head_dim), 3);
  }
  Check(Make(1, 1, 50, 2, 1, 7));  // an odd size has no decoding kernel
}

TEST_P(CudaAttentionTest, ALongSequence) { Check(Make(1, 1030, 0, 2, 1, 128)); }

TEST_P(CudaAttentionTest, ScoresThatOverflowWithoutAMaximumAreFine) {
  // Scores of several thousand: exp of them is infinite, softmax of them is not.
  const AttentionShape s = Make(1, 64, 0, 1, 1, 64);
  const Tensor q = Random({64, 64}, 1, 60.0f);
  const Tensor keys = Random({64, 64}, 2, 60.0f);
  const Tensor values = Random({64, 64}, 3);
  Tensor out = Poisoned({64, 64});
  QM_ASSERT_OK(cuda().Attention(s, OnGpu(q), OnGpu(keys), OnGpu(values), &out));
  const double largest = MaxAbsOf(values) * (1 + UnitRoundoff(dtype()) * 4);
  for (double value : Values(OnHost(out))) {
    ASSERT_TRUE(std::isfinite(value));
    ASSERT_LE(std::fabs(value), largest);
  }
}

TEST_P(CudaAttentionTest, RefusesWhatDoesNotFit) {
  const Tensor q = OnGpu(Random({4, 64}, 1));
  const Tensor kv = OnGpu(Random({4, 32}, 1));
  Tensor out = Poisoned({4, 64});
  ExpectInvalid(cuda().Attention(Make(1, 4, 1, 2, 1, 32), q, kv, kv, &out), "5 are needed");
  ExpectInvalid(cuda().Attention(Make(1, 4, 0, 3, 2, 32), q, kv, kv, &out), "must divide");
  ExpectInvalid(cuda().Attention(Make(1, 4, 0, 2, 1, 257), q, kv, kv, &out), "head_dim 257");
  ExpectInvalid(cuda().Attention(Make(1, 3, 0, 2, 1, 32), q, kv, kv, &out), "q has shape");
  AttentionShape flat = Make(1, 4, 0, 2, 1, 32);
  flat.scale = 0;
  ExpectInvalid(cuda().Attention(flat, q, kv, kv, &out), "scale");
  const Tensor other =
      OnGpu(RandomTensor({4, 32}, 1, dtype() == DType::kF32 ? DType::kF16 : DType::kF32));
  ExpectInvalid(cuda().Attention(Make(1, 4, 0, 2, 1, 32), q, other, kv, &out), "keys is");
}

}  // namespace
}  // namespace quantmill::testing
