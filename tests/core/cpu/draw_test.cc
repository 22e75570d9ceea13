// Drawing from logits on the CPU, against distribution functions in f64.
#include "tests/core/cpu/draw_support.h"

namespace quantmill::testing {
namespace {

Tensor Drawn(const Tensor& logits, const std::vector<int32_t>& excluded, const Tensor& uniforms) {
  const Tensor without = Tensor::FromI32({static_cast<int64_t>(excluded.size())}, excluded);
  return SameForAllThreads([&] { return Garbage({logits.dim(0)}, DType::kI32); },
                           [&](Backend& backend, Tensor* out) {
                             return backend.DrawRows(logits, without, uniforms, out);
                           });
}

TEST(DrawRows, InvertsTheDistributionFunction) {
  struct Case {
    int64_t rows, vocab;
    std::vector<int32_t> excluded;
  };
  for (const Case& c :
       {Case{1, 1, {}}, {9, 2, {0}}, {200, 37, {0, 36}}, {20, 32003, {1, 2, 3}}, {0, 5, {}}}) {
    const Tensor logits = RandomTensor({c.rows, c.vocab}, 1, DType::kF32, 4.0f);
    const Tensor uniforms = Uniforms(c.rows, 2);
    ExpectDrawn(logits, c.excluded, uniforms, Drawn(logits, c.excluded, uniforms));
  }
}

TEST(DrawRows, ImpossibleTokensAreNotDrawn) {
  const float inf = std::numeric_limits<float>::infinity();
  const Tensor row = Tensor::FromF32({1, 5}, {-inf, 0.0f, -inf, 1.0f, -inf});
  Tensor uniform = Tensor::Host(DType::kF64, {1}).value();
  for (const auto& [chance, token] : {std::pair(0.0, 1), {0.25, 1}, {0.3, 3}, {1 - 0x1p-53, 3}}) {
    uniform.as<double>()[0] = chance;  // the first has 1 / (1 + e) = 0.269
    EXPECT_EQ(Drawn(row, {}, uniform).as<int32_t>()[0], token) << chance;
    EXPECT_EQ(Drawn(row, {1}, uniform).as<int32_t>()[0], 3) << chance;
  }
}

TEST(DrawRows, RowsThatAreNoDistribution) {
  const float inf = std::numeric_limits<float>::infinity();
  const Tensor none = Tensor::FromI32({0}, {});
  for (const float broken : {inf, std::nanf("")}) {
    for (size_t at : {0u, 1u, 2u}) {
      std::vector<float> values = {0, 1, 2, 0, 1, 2};
      values[3 + at] = broken;
      Tensor tokens = Garbage({2}, DType::kI32);
      const absl::Status status =
          Cpu().DrawRows(Tensor::FromF32({2, 3}, values), none, Uniforms(2, 1), &tokens);
      EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status.ToString();
      EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("row 1"));
    }
  }
  Tensor tokens = Garbage({1}, DType::kI32);
  EXPECT_FALSE(
      Cpu().DrawRows(Tensor::FromF32({1, 2}, {-inf, -inf}), none, Uniforms(1, 1), &tokens).ok());
  EXPECT_FALSE(Cpu()
                   .DrawRows(Tensor::FromF32({1, 2}, {0, 0}), Tensor::FromI32({2}, {0, 1}),
                             Uniforms(1, 1), &tokens)
                   .ok());
}

TEST(DrawRows, BadArguments) {
  const Tensor logits = RandomTensor({2, 5}, 1), none = Tensor::FromI32({0}, {});
  Tensor tokens = Garbage({2}, DType::kI32), few = Garbage({1}, DType::kI32);
  ExpectInvalid(Cpu().DrawRows(logits, none, Uniforms(3, 1), &tokens), "uniforms");
  ExpectInvalid(Cpu().DrawRows(logits, none, Uniforms(2, 1), &few), "tokens");
  ExpectInvalid(Cpu().DrawRows(logits, Uniforms(2, 1), Uniforms(2, 1), &tokens), "excluded");
  ExpectInvalid(Cpu().DrawRows(Garbage({2, 0}), none, Uniforms(2, 1), &tokens), "no columns");
}

}  // namespace
}  // namespace quantmill::testing
