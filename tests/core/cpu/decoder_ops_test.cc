// Embed, RmsNorm, AddBias, Rope, SiluMultiply, Add.
#include "tests/core/cpu/support.h"

namespace quantmill::testing {
namespace {

TEST(Embed, TakesRowsOfTheTable) {
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    const Tensor table = RandomTensor({10, 37}, 1, dtype);
    const Tensor ids = Tensor::FromI32({4}, {9, 0, 3, 9});
    Tensor out = Garbage({4, 37});
    ASSERT_TRUE(Cpu().Embed(table, ids, &out).ok());
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t j = 0; j < 37; ++j) {
        EXPECT_EQ(out.as<float>()[i * 37 + j],
                  LoadElement(dtype, table.data(), ids.as<int32_t>()[i] * 37 + j));
      }
    }
  }
}

TEST(Embed, SaysWhatIsWrong) {
  const Tensor table = RandomTensor({10, 4}, 1);
  Tensor out = Garbage({2, 4});
  ExpectInvalid(Cpu().Embed(table, Tensor::FromI32({2}, {0, 10}), &out), "ids[1] is 10");
  ExpectInvalid(Cpu().Embed(table, Tensor::FromI32({2}, {-1, 0}), &out), "ids[0] is -1");
  ExpectInvalid(Cpu().Embed(table, RandomTensor({2}, 1), &out), "ids is F32");
  ExpectInvalid(Cpu().Embed(RandomTensor({40}, 1), Tensor::FromI32({2}, {0, 1}), &out), "rank 2");
  ExpectInvalid(Cpu().Embed(table, Tensor::FromI32({3}, {0, 1, 2}), &out), "out has shape [2, 4]");
}

TEST(RmsNorm, AgreesWithF64) {
  struct Case {
    int64_t rows, features, width;
  };
  for (const Case& c : {Case{1, 1, 1},
                        {3, 37, 37},
                        {5, 384, 384},
                        {4, 6 * 64, 64},
                        {2, 3 * 7, 7},
                        {70, 1000, 1000},
                        {0, 8, 8}}) {
    for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      const Tensor x = RandomTensor({c.rows, c.features}, 1, DType::kF32, 3.0f);
      const Tensor weight = RandomTensor({c.width}, 2, dtype);
      const float eps = 1e-5f;
      const Tensor out = SameForAllThreads([&] { return Garbage(x.shape()); },
                                           [&](Backend& backend, Tensor* result) {
                                             return backend.RmsNorm(x, weight, eps, result);
                                           });
      for (int64_t run = 0; run < x.elements() / c.width; ++run) {
        const float* from = x.as<float>() + run * c.width;
        double sum = 0;
        for (int64_t i = 0; i < c.width; ++i) sum += static_cast<double>(from[i]) * from[i];
        const double scale = 1 / std::sqrt(sum / static_cast<double>(c.width) + eps);
        for (int64_t i = 0; i < c.width; ++i) {
          const double expected = from[i] * scale * LoadElement(dtype, weight.data(), i);
          ASSERT_NEAR(out.as<float>()[run * c.width + i], expected,
                      SumTolerance(c.width, std::fabs(expected)));
        }
      }
      Tensor in_place = Clone(x);
      ASSERT_TRUE(Cpu().RmsNorm(in_place, weight, eps, &in_place).ok());
      EXPECT_TRUE(SameBytes(in_place, out));
    }
  }
}

TEST(RmsNorm, SaysWhatIsWrong) {
  Tensor out = Garbage({2, 8});
  const Tensor x = RandomTensor({2, 8}, 1);
  ExpectInvalid(Cpu().RmsNorm(x, RandomTensor({3}, 1), 1e-5f, &out), "do not divide");
  ExpectInvalid(Cpu().RmsNorm(x, RandomTensor({2, 4}, 1), 1e-5f, &out), "weight has shape");
  ExpectInvalid(Cpu().RmsNorm(x, RandomTensor({0}, 1), 1e-5f, &out), "do not divide");
}

TEST(Rope, RotatesHalves) {
  struct Case {
    int64_t batch, length, heads, head_dim, first;
  };
  for (const Case& c :
       {Case{1, 1, 1, 2, 0}, {2, 5, 3, 64, 0}, {1, 4, 2, 22, 7}, {3, 1, 6, 128, 19}}) {
    const int64_t half = c.head_dim / 2, positions = c.first + c.length + 1;
    const int64_t width = c.heads * c.head_dim;
    const Tensor cosine = RandomTensor({positions, half}, 1),
                 sine = RandomTensor({positions, half}, 2);
    const Tensor x = RandomTensor({c.batch * c.length, width}, 3);
    const Tensor out = SameForAllThreads([&] { return Clone(x); },
                                         [&](Backend& backend, Tensor* result) {
                                           return backend.Rope(cosine, sine, c.first, c.length,
                                                               c.head_dim, result);
                                         });
    for (int64_t row = 0; row < x.dim(0); ++row) {
      for (int64_t j = 0; j < width; ++j) {
        const int64_t in_head = j % c.head_dim, i = in_head % half;
        const int64_t at = (c.first + row % c.length) * half + i;
        const double cos = cosine.as<float>()[at], sin = sine.as<float>()[at];
        const double self = x.as<float>()[row * width + j];
        const double other = x.as<float>()[row * width + (in_head < half ? j + half : j - half)];
        const double expected = self * cos + (in_head < half ? -other : other) * sin;
        ASSERT_NEAR(out.as<float>()[row * width + j], expected,
                    SumTolerance(2, std::fabs(self * cos) + std::fabs(other * sin)));
      }
    }
  }
}

TEST(Rope, SaysWhatIsWrong) {
  const Tensor table = RandomTensor({6, 4}, 1);
  Tensor x = RandomTensor({4, 16}, 2);
  EXPECT_TRUE(Cpu().Rope(table, table, 2, 4, 8, &x).ok());
  ExpectInvalid(Cpu().Rope(table, table, 3, 4, 8, &x), "positions 3 to 6 are outside");
  ExpectInvalid(Cpu().Rope(table, table, -1, 4, 8, &x), "outside");
  ExpectInvalid(Cpu().Rope(table, table, 0, 3, 8, &x), "length 3");
  ExpectInvalid(Cpu().Rope(table, table, 0, 0, 8, &x), "length 0");
  ExpectInvalid(Cpu().Rope(table, table, 0, 4, 7, &x), "head_dim 7");
  ExpectInvalid(Cpu().Rope(table, RandomTensor({5, 4}, 1), 0, 4, 8, &x), "sine has shape");
  ExpectInvalid(Cpu().Rope(table, table, 0, 4, 8, nullptr), "x is null");
}

TEST(SiluMultiply, AgreesWithF64AndWorksInPlace) {
  for (int64_t n : {1, 5, 64, 1000, 40000}) {
    Tensor gate = RandomTensor({1, n}, 1, DType::kF32, 4.0f);
    const Tensor up = RandomTensor({1, n}, 2);
    if (n >= 5) {
      // Far in the tails: silu(x) = x, and a number that vanishes.
      gate.as<float>()[0] = 200.0f;
      gate.as<float>()[1] = -200.0f;
      gate.as<float>()[2] = 0.0f;
      gate.as<float>()[3] = -87.0f;
    }
    const Tensor out = SameForAllThreads(
        [&] {
          return Garbage({1, n});
        },
        [&](Backend& backend, Tensor* result) { return backend.SiluMultiply(gate, up, result); });
    for (int64_t i = 0; i < n; ++i) {
      const double g = gate.as<float>()[i], u = up.as<float>()[i];
      const double expected = g / (1 + std::exp(-g)) * u;
      // The exponential may be off by a few units in the last place.
      ASSERT_NEAR(out.as<float>()[i], expected, 8 * kEpsilon * std::fabs(expected) + 1e-30)
          << "gate " << g;
    }
    Tensor on_gate = Clone(gate), on_up = Clone(up);
    ASSERT_TRUE(Cpu().SiluMultiply(on_gate, up, &on_gate).ok());
    ASSERT_TRUE(Cpu().SiluMultiply(gate, on_up, &on_up).ok());
    EXPECT_TRUE(SameBytes(on_gate, out));
    EXPECT_TRUE(SameBytes(on_up, out));
  }
}

TEST(AddAndAddBias, AddExactly) {
  const Tensor x = RandomTensor({70, 333}, 1), start = RandomTensor({70, 333}, 2);
  const Tensor sum =
      SameForAllThreads([&] { return Clone(start); },
                        [&](Backend& backend, Tensor* target) { return backend.Add(x, target); });
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    const Tensor bias = RandomTensor({333}, 3, dtype);
    const Tensor biased = SameForAllThreads(
        [&] { return Clone(start); },
        [&](Backend& backend, Tensor* target) { return backend.AddBias(bias, target); });
    for (int64_t i = 0; i < x.elements(); ++i) {
      ASSERT_EQ(sum.as<float>()[i], x.as<float>()[i] + start.as<float>()[i]);
      ASSERT_EQ(biased.as<float>()[i],
                start.as<float>()[i] + LoadElement(dtype, bias.data(), i % 333));
    }
  }
}

TEST(ElementwiseOps, SayWhatIsWrong) {
  const Tensor x = RandomTensor({2, 3}, 1);
  Tensor small = Garbage({2, 2});
  ExpectInvalid(Cpu().Add(x, &small), "target has shape [2, 2]");
  ExpectInvalid(Cpu().SiluMultiply(x, small, &small), "up has shape [2, 2]");
  ExpectInvalid(Cpu().SiluMultiply(x, x, nullptr), "out is null");
  ExpectInvalid(Cpu().AddBias(RandomTensor({3}, 1), &small), "bias has shape [3]");
  ExpectInvalid(Cpu().AddBias(RandomTensor({3}, 1), nullptr), "x is null");
}

}  // namespace
}  // namespace quantmill::testing
