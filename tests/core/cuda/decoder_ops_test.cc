// Embedding, normalization, positions and element-wise steps, CUDA against the CPU.
#include <tuple>

#include "tests/core/cuda/support.h"

namespace quantmill::testing {
namespace {

class CudaDecoderOpsTest : public CudaTest {};
QM_CUDA_TEST_SUITE(CudaDecoderOpsTest);

const std::vector<std::pair<int64_t, int64_t>>& Sizes() {
  static const auto& sizes = *new std::vector<std::pair<int64_t, int64_t>>{
      {1, 1}, {3, 7}, {5, 64}, {17, 80}, {2, 257}, {9, 384}, {4, 4096}, {1, 14336}};
  return sizes;
}

TEST_P(CudaDecoderOpsTest, EmbedTakesRowsOfATableOnEitherSide) {
  for (DType table_dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (int64_t width : {3, 40, 384}) {
      const Tensor table = RandomTensor({50, width}, 3, table_dtype);
      const Tensor ids = Tensor::FromI32({6}, {49, 0, 7, 7, 1, 48});
      Tensor expected = Garbage({6, width});
      QM_ASSERT_OK(Cpu().Embed(table, ids, &expected));
      for (const Tensor& place : {table, OnGpu(table)}) {
        Tensor out = Poisoned({6, width});
        QM_ASSERT_OK(cuda().Embed(place, ids, &out));
        ExpectWithin(OnHost(out), expected, 0.0);
      }
    }
  }
}

TEST_P(CudaDecoderOpsTest, EmbedRefusesIdsOutsideTheTable) {
  const Tensor table = Random({10, 8}, 1);
  Tensor out = Poisoned({2, 8});
  ExpectInvalid(cuda().Embed(table, Tensor::FromI32({2}, {0, 10}), &out), "ids[1] is 10");
  ExpectInvalid(cuda().Embed(table, Tensor::FromI32({2}, {-1, 0}), &out), "ids[0] is -1");
  ExpectInvalid(cuda().Embed(table, Tensor::FromI32({3}, {0, 1, 2}), &out), "out has shape");
}

TEST_P(CudaDecoderOpsTest, RmsNorm) {
  for (DType weight_dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const auto& [rows, width] : Sizes()) {
      const Tensor x = Random({rows, width}, 5, 3.0f);
      const Tensor weight = RandomTensor({width}, 6, weight_dtype);
      Tensor expected = Garbage({rows, width});
      QM_ASSERT_OK(Cpu().RmsNorm(InF32(x), weight, 1e-5f, &expected));
      Tensor out = Poisoned({rows, width});
      QM_ASSERT_OK(cuda().RmsNorm(OnGpu(x), OnGpu(weight), 1e-5f, &out));
      const double relative = SumTolerance(width, 1) + 8 * kEpsilon;
      const auto bound = [&](int64_t i) { return relative * std::fabs(expected.as<float>()[i]); };
      ExpectWithin(OnHost(out), expected, bound);
      Tensor in_place = OnGpu(x);
      QM_ASSERT_OK(cuda().RmsNorm(in_place, OnGpu(weight), 1e-5f, &in_place));
      EXPECT_TRUE(SameBytes(OnHost(in_place), OnHost(out)));
    }
  }
}

TEST_P(CudaDecoderOpsTest, RmsNormOfEveryHead) {
  for (int64_t head_dim : {32, 80, 128, 33}) {
    const Tensor x = Random({5, 3 * head_dim}, 7);
    const Tensor weight = Random({head_dim}, 8);
    Tensor expected = Garbage({5, 3 * head_dim});
    QM_ASSERT_OK(Cpu().RmsNorm(InF32(x), weight, 1e-6f, &expected));
    Tensor out = Poisoned({5, 3 * head_dim});
    QM_ASSERT_OK(cuda().RmsNorm(OnGpu(x), OnGpu(weight), 1e-6f, &out));
    const double relative = SumTolerance(head_dim, 1) + 8 * kEpsilon;
    ExpectWithin(OnHost(out), expected, relative * MaxAbsOf(expected));
  }
}

TEST_P(CudaDecoderOpsTest, RmsNormRefusesUnequalWidths) {
  Tensor out = Poisoned({2, 10});
  ExpectInvalid(cuda().RmsNorm(OnGpu(Random({2, 10}, 1)), OnGpu(Random({4}, 1)), 1e-6f, &out),
                "no multiple");
}

TEST_P(CudaDecoderOpsTest, Rope) {
  struct Case {
    int64_t batch, length, heads, head_dim, first;
  };
  for (const Case& c : {Case{1, 5, 2, 64, 0}, Case{3, 7, 3, 80, 11}, Case{2, 1, 1, 6, 30},
                        Case{1, 9, 8, 128, 3}, Case{2, 4, 5, 2, 0}}) {
    const Tensor cosine = RandomTensor({41, c.head_dim / 2}, 1);
    const Tensor sine = RandomTensor({41, c.head_dim / 2}, 2);
    const Tensor x = Random({c.batch * c.length, c.heads * c.head_dim}, 3);
    Tensor expected = InF32(x);
    QM_ASSERT_OK(Cpu().Rope(cosine, sine, c.first, c.length, c.head_dim, &expected));
    Tensor out = OnGpu(x);
    QM_ASSERT_OK(cuda().Rope(OnGpu(cosine), OnGpu(sine), c.first, c.length, c.head_dim, &out));
    ExpectWithin(OnHost(out), expected, 4 * kEpsilon * MaxAbsOf(x) * 5);
  }
}

TEST_P(CudaDecoderOpsTest, RopeRefusesPositionsOutsideTheTables) {
  const Tensor table = OnGpu(RandomTensor({8, 4}, 1));
  Tensor x = OnGpu(Random({5, 16}, 2));
  ExpectInvalid(cuda().Rope(table, table, 4, 5, 8, &x), "positions 4 to 8");
  ExpectInvalid(cuda().Rope(table, table, 0, 5, 7, &x), "head_dim 7");
}

TEST_P(CudaDecoderOpsTest, SiluMultiply) {
  for (const auto& [rows, width] : Sizes()) {
    const Tensor gate = Random({rows, width}, 1, 4.0f);
    const Tensor up = Random({rows, width}, 2);
    Tensor expected = Garbage({rows, width});
    QM_ASSERT_OK(Cpu().SiluMultiply(InF32(gate), InF32(up), &expected));
    // exp, a division and two products; the CPU side is approximate too.
    const auto bound = [&](int64_t i) {
      return 16 * kEpsilon * std::fabs(expected.as<float>()[i]) + 1e-30;
    };
    Tensor out = Poisoned({rows, width});
    QM_ASSERT_OK(cuda().SiluMultiply(OnGpu(gate), OnGpu(up), &out));
    ExpectWithin(OnHost(out), expected, bound);
    for (bool over_gate : {false, true}) {
      Tensor g = OnGpu(gate);
      Tensor u = OnGpu(up);
      QM_ASSERT_OK(cuda().SiluMultiply(g, u, over_gate ? &g : &u));
      EXPECT_TRUE(SameBytes(OnHost(over_gate ? g : u), OnHost(out)));
    }
  }
}

TEST_P(CudaDecoderOpsTest, SiluOfLargeNumbersIsFinite) {
  const Tensor gate = Tensor::FromF32({1, 4}, {-1000.0f, -90.0f, 90.0f, 1000.0f});
  Tensor low = Garbage({1, 4}, dtype());
  QM_ASSERT_OK(Cpu().Copy(gate, &low));
  Tensor one = Garbage({1, 4}, dtype());
  QM_ASSERT_OK(Cpu().Copy(Tensor::FromF32({1, 4}, {1, 1, 1, 1}), &one));
  Tensor out = Poisoned({1, 4});
  QM_ASSERT_OK(cuda().SiluMultiply(OnGpu(low), OnGpu(one), &out));
  ExpectWithin(OnHost(out), Tensor::FromF32({1, 4}, {0, 0, 90, 1000}), 1e-30);
}

TEST_P(CudaDecoderOpsTest, AddAndAddBias) {
  for (const auto& [rows, width] : Sizes()) {
    const Tensor x = Random({rows, width}, 1);
    const Tensor y = Random({rows, width}, 2);
    Tensor expected = InF32(y);
    QM_ASSERT_OK(Cpu().Add(InF32(x), &expected));
    Tensor sum = OnGpu(y);
    QM_ASSERT_OK(cuda().Add(OnGpu(x), &sum));
    ExpectWithin(OnHost(sum), expected, 0.0);
    for (DType bias_dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      const Tensor bias = RandomTensor({width}, 3, bias_dtype);
      Tensor biased_expected = InF32(y);
      QM_ASSERT_OK(Cpu().AddBias(bias, &biased_expected));
      Tensor biased = OnGpu(y);
      QM_ASSERT_OK(cuda().AddBias(OnGpu(bias), &biased));
      ExpectWithin(OnHost(biased), biased_expected, 0.0);
    }
  }
}

TEST_P(CudaDecoderOpsTest, UnequalShapesAreRefused) {
  const Tensor a = OnGpu(Random({2, 3}, 1));
  Tensor b = OnGpu(Random({3, 2}, 1));
  ExpectInvalid(cuda().Add(a, &b), "has shape");
  ExpectInvalid(cuda().SiluMultiply(a, b, &b), "has shape");
  ExpectInvalid(cuda().AddBias(OnGpu(Random({3}, 1)), &b), "bias has shape");
  Tensor host = Random({2, 3}, 1);
  ExpectInvalid(cuda().Add(a, &host), "expected on cuda:0");
}

}  // namespace
}  // namespace quantmill::testing
