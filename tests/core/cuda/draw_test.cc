// Drawing from logits, CUDA against distribution functions in f64 and against the CPU.
#include "tests/core/cpu/draw_support.h"
#include "tests/core/cuda/support.h"

namespace quantmill::testing {
namespace {

class CudaDrawTest : public CudaTest {
 protected:
  Tensor Drawn(const Tensor& logits, const std::vector<int32_t>& excluded, const Tensor& uniforms) {
    const Tensor without = Tensor::FromI32({static_cast<int64_t>(excluded.size())}, excluded);
    Tensor tokens = Garbage({logits.dim(0)}, DType::kI32);
    const absl::Status status = cuda().DrawRows(OnGpu(logits), without, uniforms, &tokens);
    EXPECT_TRUE(status.ok()) << status.ToString();
    return tokens;
  }
};
QM_CUDA_TEST_SUITE(CudaDrawTest);

TEST_P(CudaDrawTest, InvertsTheDistributionFunction) {
  struct Case {
    int64_t rows, vocab;
    std::vector<int32_t> excluded;
  };
  for (const Case& c : {Case{1, 1, {}},
                        {9, 2, {0}},
                        {50, 15, {}},
                        {200, 513, {0, 512}},
                        {300, 8192, {0, 1}},
                        {20, 128256, {1, 2, 3}}}) {
    const Tensor logits = Random({c.rows, c.vocab}, 1, 4.0f);
    const Tensor uniforms = Uniforms(c.rows, 2);
    const Tensor tokens = Drawn(logits, c.excluded, uniforms);
    ExpectDrawn(logits, c.excluded, uniforms, tokens);
    Tensor expected = Garbage({c.rows}, DType::kI32);
    QM_ASSERT_OK(Cpu().DrawRows(
        InF32(logits), Tensor::FromI32({static_cast<int64_t>(c.excluded.size())}, c.excluded),
        uniforms, &expected));
    int64_t same = 0;
    for (int64_t i = 0; i < c.rows; ++i) {
      same += tokens.as<int32_t>()[i] == expected.as<int32_t>()[i] ? 1 : 0;
    }
    EXPECT_GE(same, c.rows - 2);  // a border between two tokens may move by the weights' rounding
    EXPECT_TRUE(SameBytes(tokens, Drawn(logits, c.excluded, uniforms)));
  }
}

TEST_P(CudaDrawTest, OneTokenTakesAll) {
  for (const int64_t at : {0, 31, 32, 511, 999}) {
    Tensor logits = Garbage({3, 1000}, dtype());
    for (int64_t i = 0; i < 3000; ++i) StoreElement(dtype(), -1000.0f, logits.data(), i);
    for (int64_t row = 0; row < 3; ++row) {
      StoreElement(dtype(), 0.0f, logits.data(), row * 1000 + at);
      StoreElement(dtype(), 500.0f, logits.data(), row * 1000 + 7);  // is excluded
    }
    const Tensor tokens = Drawn(logits, {7}, Uniforms(3, 1));
    for (int64_t row = 0; row < 3; ++row) EXPECT_EQ(tokens.as<int32_t>()[row], at);
  }
}

TEST_P(CudaDrawTest, RowsThatAreNoDistribution) {
  const float inf = std::numeric_limits<float>::infinity();
  const Tensor none = Tensor::FromI32({0}, {});
  for (const float broken : {inf, std::nanf("")}) {
    for (int64_t at : {0, 40, 599}) {
      Tensor logits = Random({2, 600}, 1);
      StoreElement(dtype(), broken, logits.data(), 600 + at);
      Tensor tokens = Garbage({2}, DType::kI32);
      const absl::Status status = cuda().DrawRows(OnGpu(logits), none, Uniforms(2, 1), &tokens);
      EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status.ToString();
      EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("row 1"));
    }
  }
  Tensor logits = Garbage({1, 2}, dtype());
  for (int64_t i = 0; i < 2; ++i) StoreElement(dtype(), -inf, logits.data(), i);
  Tensor tokens = Garbage({1}, DType::kI32);
  EXPECT_FALSE(cuda().DrawRows(OnGpu(logits), none, Uniforms(1, 1), &tokens).ok());
}

TEST_P(CudaDrawTest, RefusesWhatDoesNotFit) {
  const Tensor logits = OnGpu(Random({2, 5}, 1)), none = Tensor::FromI32({0}, {});
  Tensor tokens = Garbage({2}, DType::kI32), few = Garbage({1}, DType::kI32);
  ExpectInvalid(cuda().DrawRows(logits, none, Uniforms(3, 1), &tokens), "uniforms has shape");
  ExpectInvalid(cuda().DrawRows(logits, none, Uniforms(2, 1), &few), "tokens has shape");
}

}  // namespace
}  // namespace quantmill::testing
