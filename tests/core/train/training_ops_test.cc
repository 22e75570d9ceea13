#include "core/train/training_ops.h"

#include "tests/core/cpu/support.h"
#include "tests/core/train/slow_backward.h"

namespace quantmill::testing {
namespace {

constexpr double kOpsTolerance = 1e-5;  // relative; f32 sums of a few hundred terms

struct OpsRig {
  explicit OpsRig(int threads = 2)
      : backend(MakeCpuBackend(threads).value()), ops(MakeTrainingOps(*backend).value()) {}
  std::unique_ptr<Backend> backend;
  std::unique_ptr<TrainingOps> ops;
};

Tensor Zeros(Shape shape) { return Tensor::HostZeros(DType::kF32, shape).value(); }

double Error(const Tensor& actual, const Doubles& expected) {
  return RelativeError(Values(actual), expected);
}

AttentionShape MakeShape(int64_t batch, int64_t length, int64_t heads, int64_t kv_heads,
                         int64_t dim, int64_t window) {
  AttentionShape shape;
  shape.batch = batch;
  shape.query_length = length;
  shape.heads = heads;
  shape.kv_heads = kv_heads;
  shape.head_dim = dim;
  shape.sliding_window = window;
  shape.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(dim)));
  return shape;
}

struct AttentionGradients {
  Tensor q, keys, values;
};

AttentionGradients RunAttention(const AttentionShape& s, int threads, const Tensor& q,
                                const Tensor& keys, const Tensor& values, const Tensor& d_out) {
  OpsRig rig(threads);
  AttentionGradients d = {Garbage(q.shape()), Garbage(keys.shape()), Garbage(keys.shape())};
  EXPECT_TRUE(rig.ops->Attention(s, q, keys, values, d_out, &d.q, &d.keys, &d.values).ok());
  return d;
}

TEST(TrainingOps, AttentionOverTilesWindowsAndGroups) {
  // 300 queries: three tiles, the last one short.
  const AttentionShape shapes[] = {MakeShape(1, 300, 4, 2, 16, 0), MakeShape(2, 131, 3, 3, 8, 0),
                                   MakeShape(1, 300, 4, 1, 8, 70), MakeShape(2, 5, 2, 1, 4, 1),
                                   MakeShape(1, 1, 1, 1, 2, 0)};
  for (const AttentionShape& s : shapes) {
    const int64_t rows = s.batch * s.query_length;
    const Tensor q = RandomTensor({rows, s.heads * s.head_dim}, 1, DType::kF32, 2);
    const Tensor keys = RandomTensor({rows, s.kv_heads * s.head_dim}, 2, DType::kF32, 2);
    const Tensor values = RandomTensor(keys.shape(), 3);
    const Tensor d_out = RandomTensor(q.shape(), 4);
    const SlowAttention slow =
        SlowAttentionBackward(s, Values(q), Values(keys), Values(values), Values(d_out));
    const AttentionGradients d = RunAttention(s, 2, q, keys, values, d_out);
    EXPECT_LT(Error(d.q, slow.d_q), kOpsTolerance) << s.query_length;
    EXPECT_LT(Error(d.keys, slow.d_keys), kOpsTolerance) << s.query_length;
    EXPECT_LT(Error(d.values, slow.d_values), kOpsTolerance) << s.query_length;
    const AttentionGradients other = RunAttention(s, 3, q, keys, values, d_out);
    EXPECT_TRUE(SameBytes(d.q, other.q) && SameBytes(d.keys, other.keys) &&
                SameBytes(d.values, other.values));
  }
}

TEST(TrainingOps, NormWritesOrAddsAndSumsItsWeight) {
  OpsRig rig, other(1);
  for (const Shape& shape : {Shape{150, 24}, Shape{3, 48}, Shape{1, 1}}) {
    const int64_t width = shape[1] == 48 ? 12 : shape[1];  // 48: four heads per row
    const Tensor x = RandomTensor(shape, 5), weight = RandomTensor({width}, 6);
    const Tensor d_y = RandomTensor(shape, 7);
    const SlowNorm slow = SlowNormBackward(Values(x), Values(weight), 1e-5, Values(d_y));
    Tensor d_x = Garbage(shape), d_weight = Zeros({width});
    ASSERT_TRUE(rig.ops->RmsNorm(x, weight, 1e-5f, d_y, false, &d_x, &d_weight).ok());
    EXPECT_LT(Error(d_x, slow.d_x), shape[1] == 1 ? 1e-2 : kOpsTolerance);  // 1: differences cancel
    EXPECT_LT(Error(d_weight, slow.d_weight), kOpsTolerance);

    Tensor in_place = Clone(d_y), again = Zeros({width});
    ASSERT_TRUE(other.ops->RmsNorm(x, weight, 1e-5f, in_place, false, &in_place, &again).ok());
    EXPECT_TRUE(SameBytes(in_place, d_x) && SameBytes(again, d_weight));

    Tensor sum = Clone(d_x);
    ASSERT_TRUE(rig.ops->RmsNorm(x, weight, 1e-5f, d_y, true, &sum, nullptr).ok());
    ASSERT_TRUE(rig.ops->RmsNorm(x, weight, 1e-5f, d_y, false, &d_x, &d_weight).ok());
    Doubles twice = Values(d_x);
    for (double& value : twice) value *= 2;
    EXPECT_LT(Error(sum, twice), 1e-6);
    twice = slow.d_weight;
    for (double& value : twice) value *= 2;
    EXPECT_LT(Error(d_weight, twice), kOpsTolerance);
  }
}

TEST(TrainingOps, LinearAddsToParametersAndWritesInputs) {
  OpsRig rig;
  const int64_t rows = 70, in = 300, out = 33;
  const Tensor x = RandomTensor({rows, in}, 8), d_y = RandomTensor({rows, out}, 9);
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    const Tensor weight = RandomTensor({out, in}, 10, dtype);
    const Doubles xs = Values(x), ws = Values(weight), ds = Values(d_y);
    Doubles d_x(xs.size()), d_w(ws.size()), d_b(static_cast<size_t>(out));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t o = 0; o < out; ++o) {
        const double d = ds[static_cast<size_t>(r * out + o)];
        d_b[static_cast<size_t>(o)] += d;
        for (int64_t i = 0; i < in; ++i) {
          d_x[static_cast<size_t>(r * in + i)] += d * ws[static_cast<size_t>(o * in + i)];
          d_w[static_cast<size_t>(o * in + i)] += d * xs[static_cast<size_t>(r * in + i)];
        }
      }
    }
    Tensor gx = Garbage(x.shape()), gw = Zeros(weight.shape()), gb = Zeros({out});
    ASSERT_TRUE(rig.ops->InputGradient(d_y, weight, false, &gx).ok());
    ASSERT_TRUE(rig.ops->WeightGradient(d_y, x, &gw).ok());
    ASSERT_TRUE(rig.ops->BiasGradient(d_y, &gb).ok());
    EXPECT_LT(Error(gx, d_x), kOpsTolerance);
    EXPECT_LT(Error(gw, d_w), kOpsTolerance);
    EXPECT_LT(Error(gb, d_b), kOpsTolerance);
    ASSERT_TRUE(rig.ops->InputGradient(d_y, weight, true, &gx).ok());
    ASSERT_TRUE(rig.ops->WeightGradient(d_y, x, &gw).ok());
    for (double& value : d_x) value *= 2;
    for (double& value : d_w) value *= 2;
    EXPECT_LT(Error(gx, d_x), kOpsTolerance);
    EXPECT_LT(Error(gw, d_w), kOpsTolerance);
  }
}

TEST(TrainingOps, SiluAgreesWithDifferences) {
  OpsRig rig;
  const Tensor gate = RandomTensor({7, 9}, 11, DType::kF32, 3), up = RandomTensor({7, 9}, 12);
  const Tensor d_y = RandomTensor({7, 9}, 13);
  const auto silu = [](double g) { return g / (1 + std::exp(-g)); };
  Doubles d_gate, d_up;
  for (size_t i = 0; i < 63; ++i) {
    const double g = Values(gate)[i], u = Values(up)[i], d = Values(d_y)[i], step = 1e-5;
    d_gate.push_back(d * u * (silu(g + step) - silu(g - step)) / (2 * step));
    d_up.push_back(d * silu(g));
  }
  Tensor gg = Garbage({7, 9}), gu = Clone(d_y);
  ASSERT_TRUE(rig.ops->SiluMultiply(gate, up, gu, &gg, &gu).ok());
  EXPECT_LT(Error(gg, d_gate), kOpsTolerance);
  EXPECT_LT(Error(gu, d_up), kOpsTolerance);
}

TEST(TrainingOps, RopeIsTheTransposeOfTheForwardPass) {
  // <rope(x), y> = <x, rope^T(y)>, rope being linear.
  OpsRig rig;
  const int64_t rows = 10, heads = 3, dim = 8;
  const Tensor cosine = RandomTensor({9, dim / 2}, 14), sine = RandomTensor({9, dim / 2}, 15);
  Tensor x = RandomTensor({rows, heads * dim}, 16), y = RandomTensor({rows, heads * dim}, 17);
  const Doubles xs = Values(x), ys = Values(y);
  ASSERT_TRUE(rig.backend->Rope(cosine, sine, 4, 5, dim, &x).ok());
  ASSERT_TRUE(rig.ops->Rope({cosine, sine, 4, 5, dim}, &y).ok());
  double left = 0, right = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    left += Values(x)[i] * ys[i];
    right += xs[i] * Values(y)[i];
  }
  EXPECT_NEAR(left, right, 1e-4);
}

AdamWUpdate MakeUpdate(Shape shape, uint32_t seed, DType stored) {
  AdamWUpdate update;
  update.step.rate = 0.01;
  update.step.decay = 0.1;
  update.step.step = 2;
  update.step.gradient_scale = 0.5f;
  update.gradient = RandomTensor(shape, seed);
  update.master = RandomTensor(shape, seed + 1);
  update.first_moment = RandomTensor(shape, seed + 2);
  update.second_moment = Zeros(shape);
  update.stored = Garbage(shape, stored);
  return update;
}

// Several parameters at once, against the formulas in f64.
TEST(TrainingOps, AdamWUpdatesRoundsAndZeroes) {
  OpsRig rig;
  std::vector<AdamWUpdate> updates;
  std::vector<Doubles> g, p, m, mean;
  for (DType stored : {DType::kF32, DType::kF16, DType::kBF16}) {
    const auto index = static_cast<uint32_t>(updates.size());
    updates.push_back(MakeUpdate({3 + index, 7}, 30 + 4 * index, stored));
    g.push_back(Values(updates.back().gradient));
    p.push_back(Values(updates.back().master));
    m.push_back(Values(updates.back().first_moment));
    updates.back().step.average_keep = 0.75;
    mean.emplace_back();
    if (stored == DType::kF16) continue;  // one without
    updates.back().average = RandomTensor(updates.back().gradient.shape(), 80 + index);
    mean.back() = Values(updates.back().average);
  }
  updates.push_back(MakeUpdate({0}, 60, DType::kBF16));  // nothing to do
  double squares = 0;
  std::vector<Tensor> gradients;
  for (const AdamWUpdate& update : updates) gradients.push_back(update.gradient);
  for (const Doubles& values : g) {
    for (double value : values) squares += value * value;
  }
  EXPECT_NEAR(rig.ops->SumOfSquares(gradients).value(), squares, 1e-12 * squares);
  EXPECT_EQ(rig.ops->SumOfSquares({}).value(), 0);

  ASSERT_TRUE(rig.ops->AdamW(updates).ok());
  for (size_t i = 0; i < g.size(); ++i) {
    Doubles expected;
    for (size_t k = 0; k < g[i].size(); ++k) {
      const double gradient = g[i][k] / 2;
      const double first = (0.9 * m[i][k] + 0.1 * gradient) / (1 - 0.9 * 0.9);
      const double second = 0.001 * gradient * gradient / (1 - 0.999 * 0.999);
      expected.push_back(p[i][k] * (1 - 0.01 * 0.1) - 0.01 * first / (std::sqrt(second) + 1e-8));
    }
    EXPECT_LT(Error(updates[i].master, expected), kOpsTolerance) << i;
    for (size_t k = 0; k < mean[i].size(); ++k) mean[i][k] = 0.75 * mean[i][k] + 0.25 * expected[k];
    if (!mean[i].empty()) {
      EXPECT_LT(Error(updates[i].average, mean[i]), kOpsTolerance) << i;
    }
    Tensor rounded = Garbage(updates[i].stored.shape(), updates[i].stored.dtype());
    for (int64_t k = 0; k < rounded.elements(); ++k) {
      StoreFloat(rounded, k, updates[i].master.as<float>()[k]);
    }
    EXPECT_TRUE(SameBytes(updates[i].stored, rounded)) << i;
    for (double value : Values(updates[i].gradient)) EXPECT_EQ(value, 0);
  }
}

TEST(TrainingOps, AdamWRefusesWrongArguments) {
  OpsRig rig;
  const auto refused = [&](const auto& change) {
    AdamWUpdate update = MakeUpdate({2, 3}, 70, DType::kBF16);
    change(update);
    return rig.ops->AdamW({update}).code() == absl::StatusCode::kInvalidArgument;
  };
  EXPECT_FALSE(refused([](AdamWUpdate&) {}));
  EXPECT_TRUE(refused([](AdamWUpdate& u) { u.step.step = 0; }));
  EXPECT_TRUE(refused([](AdamWUpdate& u) { u.master = Zeros({3, 2}); }));
  EXPECT_TRUE(refused([](AdamWUpdate& u) { u.average = Zeros({3, 2}); }));
  EXPECT_TRUE(refused([](AdamWUpdate& u) { u.step.average_keep = 1.5; }));
  EXPECT_TRUE(refused([](AdamWUpdate& u) { u.step.average_keep = NAN; }));
  EXPECT_TRUE(refused([](AdamWUpdate& u) { u.stored = Tensor::FromI32({1}, {1}); }));
  EXPECT_TRUE(refused([](AdamWUpdate& u) { u.first_moment = u.stored; }));
}

TEST(TrainingOps, RefusesWrongArguments) {
  OpsRig rig;
  Tensor small = Zeros({2, 3}), large = Zeros({2, 4}), bias = Zeros({4});
  const Tensor half = Tensor::HostZeros(DType::kF16, {2, 3}).value();
  EXPECT_FALSE(rig.ops->Add(small, &large).ok());
  EXPECT_FALSE(rig.ops->Add(half, &small).ok());
  EXPECT_FALSE(rig.ops->Add(small, nullptr).ok());
  EXPECT_FALSE(rig.ops->BiasGradient(small, &bias).ok());
  EXPECT_FALSE(rig.ops->InputGradient(small, large, false, &large).ok());
  EXPECT_FALSE(rig.ops->RmsNorm(small, bias, 0, small, false, &small, nullptr).ok());
  EXPECT_FALSE(rig.ops->RmsNorm(large, bias, 0, large, true, &large, nullptr).ok());  // d_x is d_y
  AttentionShape shape = MakeShape(1, 2, 1, 1, 3, 0);
  Tensor d = Zeros({2, 3});
  EXPECT_TRUE(rig.ops->Attention(shape, small, small, small, small, &d, &d, &d).ok());
  shape.past_length = 1;
  EXPECT_FALSE(rig.ops->Attention(shape, small, small, small, small, &d, &d, &d).ok());
}

}  // namespace
}  // namespace quantmill::testing
