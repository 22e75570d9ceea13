// The CUDA backward passes against the CPU's, over the same (rounded) inputs.
#include "absl/strings/str_cat.h"
#include "core/train/training_ops.h"
#include "tests/core/cuda/support.h"
#include "tests/core/train/fixtures.h"

namespace quantmill::testing {
namespace {

// Relative to the largest gradient: f32 differs by the order of sums and the rounding of expf; in
// 16 bits the gradient of an output, the probabilities and their gradient are rounded as factors of
// products.
double Tolerance(DType dtype) { return dtype == DType::kF32 ? 2e-5 : 8 * UnitRoundoff(dtype); }

class CudaTrainTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    ops_ = MakeTrainingOps(cuda()).value();
    cpu_ = MakeCpuBackend(2).value();
    cpu_ops_ = MakeTrainingOps(*cpu_).value();
  }
  TrainingOps& gpu() { return *ops_; }
  TrainingOps& cpu() { return *cpu_ops_; }
  Tensor Gradient(Shape shape, uint32_t seed) { return RandomTensor(shape, seed); }
  Tensor Zeros(Shape shape) { return Tensor::HostZeros(DType::kF32, shape).value(); }

  void ExpectClose(const char* what, const Tensor& on_gpu, const Tensor& on_cpu,
                   double tolerance = 0) {
    if (tolerance == 0) tolerance = Tolerance(dtype());
    EXPECT_LT(RelativeError(Values(OnHost(on_gpu)), Values(on_cpu)), tolerance) << what;
  }

  struct Sizes {
    int64_t batch, length, heads, kv_heads, dim, window;
  };
  void CheckAttention(const Sizes& z) {
    const std::string what =
        absl::StrCat("batch ", z.batch, " length ", z.length, " heads ", z.heads, "/", z.kv_heads,
                     " dim ", z.dim, " window ", z.window, ": ");
    AttentionShape s;
    s.batch = z.batch;
    s.query_length = z.length;
    s.heads = z.heads;
    s.kv_heads = z.kv_heads;
    s.head_dim = z.dim;
    s.sliding_window = z.window;
    s.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(z.dim)));
    const int64_t rows = z.batch * z.length;
    const Tensor q = Random({rows, z.heads * z.dim}, 1),
                 keys = Random({rows, z.kv_heads * z.dim}, 2);
    const Tensor values = Random(keys.shape(), 3), d_out = Gradient(q.shape(), 4);
    Tensor d_q = Poisoned(q.shape(), DType::kF32), d_k = Poisoned(keys.shape(), DType::kF32);
    Tensor d_v = Poisoned(keys.shape(), DType::kF32);
    QM_ASSERT_OK(
        gpu().Attention(s, OnGpu(q), OnGpu(keys), OnGpu(values), OnGpu(d_out), &d_q, &d_k, &d_v));
    Tensor c_q = Garbage(q.shape()), c_k = Garbage(keys.shape()), c_v = Garbage(keys.shape());
    QM_ASSERT_OK(cpu().Attention(s, InF32(q), InF32(keys), InF32(values), d_out, &c_q, &c_k, &c_v));
    // A single key has probability 1: no gradient reaches q and k but by rounding.
    const bool single = z.length == 1 || z.window == 1;
    if (!single) ExpectClose((what + "d_q").c_str(), d_q, c_q);
    if (!single) ExpectClose((what + "d_k").c_str(), d_k, c_k);
    ExpectClose((what + "d_v").c_str(), d_v, c_v);
  }

 private:
  std::unique_ptr<TrainingOps> ops_;
  std::unique_ptr<Backend> cpu_;
  std::unique_ptr<TrainingOps> cpu_ops_;
};

TEST_P(CudaTrainTest, Attention) {
  // 1100 queries: two tiles, the second one short; a window that leaves keys of the first tile out.
  for (const Sizes& z : {Sizes{2, 37, 4, 2, 16, 0}, Sizes{1, 1100, 2, 1, 32, 0},
                         Sizes{1, 1100, 2, 2, 8, 50}, Sizes{3, 1, 3, 3, 4, 1}}) {
    CheckAttention(z);
  }
}

// Head dimensions with a kernel of their own in 16 bits: tails of its blocks and tiles, groups of
// heads, windows shorter and longer than a tile, a block and the sequence.
TEST_P(CudaTrainTest, FusedAttention) {
  for (int64_t dim : {64, 128}) {
    for (const auto& [length, heads, kv_heads, window] : {std::array<int64_t, 4>{1, 2, 2, 0},
                                                          {7, 3, 1, 0},
                                                          {33, 6, 2, 0},
                                                          {64, 1, 1, 0},
                                                          {100, 4, 1, 0},
                                                          {100, 2, 2, 1},
                                                          {129, 6, 2, 20},
                                                          {300, 3, 3, 64},
                                                          {300, 4, 1, 100},
                                                          {200, 2, 1, 500},
                                                          {1024, 3, 1, 0}}) {
      CheckAttention({length < 200 ? 3 : 1, length, heads, kv_heads, dim, window});
    }
  }
}

// The same bytes twice.
TEST_P(CudaTrainTest, AttentionIsDeterministic) {
  AttentionShape s;
  s.batch = 2;
  s.query_length = 500;
  s.heads = 6;
  s.kv_heads = 2;
  s.head_dim = 64;
  s.scale = 0.125f;
  const Tensor q = OnGpu(Random({1000, 384}, 1)), keys = OnGpu(Random({1000, 128}, 2));
  const Tensor values = OnGpu(Random({1000, 128}, 3)), d_out = OnGpu(Gradient({1000, 384}, 4));
  std::vector<Tensor> runs;
  for (int run = 0; run < 2; ++run) {
    Tensor d_q = Poisoned(q.shape(), DType::kF32), d_k = Poisoned(keys.shape(), DType::kF32);
    Tensor d_v = Poisoned(keys.shape(), DType::kF32);
    QM_ASSERT_OK(gpu().Attention(s, q, keys, values, d_out, &d_q, &d_k, &d_v));
    for (const Tensor& tensor : {d_q, d_k, d_v}) runs.push_back(OnHost(tensor));
  }
  for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(SameBytes(runs[i], runs[i + 3])) << i;
}

TEST_P(CudaTrainTest, Norm) {
  for (const auto& [rows, columns, width] : {std::array<int64_t, 3>{5, 96, 32},
                                             {700, 128, 128},
                                             {1000, 384, 384},
                                             {33, 1000, 1000},
                                             {3, 5000, 5000},
                                             {7, 192, 64},
                                             {2, 7, 7}}) {
    const Tensor x = Random({rows, columns}, 5), weight = Random({width}, 6);
    const Tensor d_y = Gradient(x.shape(), 7), before = Gradient(x.shape(), 8);
    for (bool add : {false, true}) {
      Tensor d_x = OnGpu(before), d_w = OnGpu(Zeros({width}));
      QM_ASSERT_OK(gpu().RmsNorm(OnGpu(x), OnGpu(weight), 1e-5f, OnGpu(d_y), add, &d_x, &d_w));
      Tensor c_x = Clone(before), c_w = Zeros({width});
      QM_ASSERT_OK(cpu().RmsNorm(InF32(x), weight, 1e-5f, d_y, add, &c_x, &c_w));
      ExpectClose("d_x", d_x, c_x, 2e-5);
      ExpectClose("d_weight", d_w, c_w, 2e-5);
      if (add) continue;
      Tensor in_place = OnGpu(d_y);
      QM_ASSERT_OK(
          gpu().RmsNorm(OnGpu(x), OnGpu(weight), 1e-5f, in_place, false, &in_place, nullptr));
      EXPECT_TRUE(SameBytes(OnHost(in_place), OnHost(d_x)));
    }
  }
}

TEST_P(CudaTrainTest, Linear) {
  const int64_t rows = 300, in = 65, out = 130;
  const Tensor x = Random({rows, in}, 9), weight = Random({out, in}, 10);
  const Tensor d_y = Gradient({rows, out}, 11);
  Tensor d_x = Poisoned({rows, in}, DType::kF32), d_w = OnGpu(Zeros({out, in}));
  Tensor d_b = OnGpu(Zeros({out}));
  Tensor c_x = Garbage({rows, in}), c_w = Zeros({out, in}), c_b = Zeros({out});
  for (bool add : {false, true}) {  // the second time everything is added to
    QM_ASSERT_OK(gpu().InputGradient(OnGpu(d_y), OnGpu(weight), add, &d_x));
    QM_ASSERT_OK(gpu().WeightGradient(OnGpu(d_y), OnGpu(x), &d_w));
    QM_ASSERT_OK(gpu().BiasGradient(OnGpu(d_y), &d_b));
    QM_ASSERT_OK(cpu().InputGradient(d_y, InF32(weight), add, &c_x));
    QM_ASSERT_OK(cpu().WeightGradient(d_y, InF32(x), &c_w));
    QM_ASSERT_OK(cpu().BiasGradient(d_y, &c_b));
    ExpectClose("d_x", d_x, c_x);
    ExpectClose("d_weight", d_w, c_w);
    ExpectClose("d_bias", d_b, c_b, 2e-5);
  }
  // Rounded once for both products: the same sums to the bit.
  const Tensor factor = gpu().AsFactor(OnGpu(d_y)).value();
  EXPECT_EQ(factor.dtype(), dtype());
  Tensor again_x = Poisoned({rows, in}, DType::kF32), again_w = OnGpu(Zeros({out, in}));
  Tensor once_x = Poisoned({rows, in}, DType::kF32), once_w = OnGpu(Zeros({out, in}));
  QM_ASSERT_OK(gpu().InputGradient(OnGpu(d_y), OnGpu(weight), false, &once_x));
  QM_ASSERT_OK(gpu().WeightGradient(OnGpu(d_y), OnGpu(x), &once_w));
  QM_ASSERT_OK(gpu().InputGradient(factor, OnGpu(weight), false, &again_x));
  QM_ASSERT_OK(gpu().WeightGradient(factor, OnGpu(x), &again_w));
  EXPECT_TRUE(SameBytes(OnHost(once_x), OnHost(again_x)));
  EXPECT_TRUE(SameBytes(OnHost(once_w), OnHost(again_w)));
}

TEST_P(CudaTrainTest, Elementwise) {
  for (const Shape& shape : {Shape{33, 77}, Shape{40, 64}}) {  // by single elements, by fours
    const Tensor gate = Random(shape, 12, 3), up = Random(shape, 13), d_y = Gradient(shape, 14);
    Tensor d_gate = Poisoned(shape, DType::kF32), d_up = OnGpu(d_y);
    QM_ASSERT_OK(gpu().SiluMultiply(OnGpu(gate), OnGpu(up), d_up, &d_gate, &d_up));
    Tensor c_gate = Garbage(shape), c_up = Garbage(shape);
    QM_ASSERT_OK(cpu().SiluMultiply(InF32(gate), InF32(up), d_y, &c_gate, &c_up));
    ExpectClose("d_gate", d_gate, c_gate, 2e-5);
    ExpectClose("d_up", d_up, c_up, 2e-5);
  }

  const Tensor cosine = Gradient({20, 6}, 15), sine = Gradient({20, 6}, 16);
  Tensor turned = OnGpu(Gradient({15, 36}, 17)), c_turned = Gradient({15, 36}, 17);
  QM_ASSERT_OK(gpu().Rope({OnGpu(cosine), OnGpu(sine), 3, 5, 12}, &turned));
  QM_ASSERT_OK(cpu().Rope({cosine, sine, 3, 5, 12}, &c_turned));
  ExpectClose("rope", turned, c_turned, 1e-6);

  Tensor sum = OnGpu(Gradient({33, 77}, 14)), c_sum = Gradient({33, 77}, 14);
  QM_ASSERT_OK(gpu().Add(OnGpu(Gradient({33, 77}, 18)), &sum));
  QM_ASSERT_OK(cpu().Add(Gradient({33, 77}, 18), &c_sum));
  EXPECT_TRUE(SameBytes(OnHost(sum), c_sum));
}

// Roundings that add up in a block in 16 bits: about a dozen of activations and as many of
// gradients.
constexpr double kBlockRoundings = 24;

// f32 keeps the bound of the CPU.
TEST_P(CudaTrainTest, BlocksAgreeWithPyTorch) {
  const double tolerance = dtype() == DType::kF32 ? 1e-4 : kBlockRoundings * UnitRoundoff(dtype());
  for (const std::string& name : GradientFixtureNames()) {
    const GradientFixture fixture(name);
    for (int64_t block = 0; block < fixture.config().layers; ++block) {
      for (const NamedError& e : BlockErrors(fixture, block, cuda())) {
        EXPECT_LT(e.error, tolerance) << name << " " << e.name;
      }
    }
  }
}

TEST_P(CudaTrainTest, TokenLosses) {
  for (int64_t vocab : {5, 1000, 8192, 33333}) {
    const int64_t rows = 37;
    const Tensor logits = RandomTensor({rows, vocab}, 20, DType::kF32, 4);
    const Tensor teacher = Random({rows, vocab}, 21, 4);
    std::vector<int32_t> ids;
    for (int32_t i = 0; i < rows; ++i) ids.push_back(i % 4 == 0 ? -1 : i % 5);
    const Tensor targets = Tensor::FromI32({rows}, ids);
    for (const bool distills : {false, true}) {
      const TokenLoss weights = distills ? TokenLoss{0.3f, 0.7f} : TokenLoss{1, 0};
      Tensor d = OnGpu(logits), losses = Poisoned({rows, 2}, DType::kF32);
      QM_ASSERT_OK(gpu().TokenLosses(OnGpu(targets), distills ? OnGpu(teacher) : Tensor(), weights,
                                     2, &d, &losses));
      Tensor c_d = Clone(logits), c_losses = Garbage({rows, 2});
      QM_ASSERT_OK(
          cpu().TokenLosses(targets, distills ? teacher : Tensor(), weights, 2, &c_d, &c_losses));
      ExpectClose("gradient", d, c_d, 1e-5);
      ExpectClose("losses", losses, c_losses, 1e-5);
    }
  }
}

// Rows in order: the sums are those of the CPU to the bit. Widths around a block's columns, ids
// that appear in every row, in some, or not at all, and more rows than one tile of the search.
TEST_P(CudaTrainTest, Embedding) {
  for (const auto& [rows, vocab, width] :
       {std::array<int64_t, 3>{50, 9, 300}, {1, 3, 1}, {2500, 40, 513}, {1024, 1, 64}}) {
    const Tensor d_rows = Gradient({rows, width}, 22);
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < rows; ++i) {
      ids.push_back(static_cast<int32_t>(i % 3 == 0 ? 0 : i * i % 7 % vocab));
    }
    const Tensor before = Gradient({vocab, width}, 23);
    Tensor table = OnGpu(before), expected = Clone(before);
    QM_ASSERT_OK(gpu().Embed(OnGpu(Tensor::FromI32({rows}, ids)), OnGpu(d_rows), &table));
    QM_ASSERT_OK(cpu().Embed(Tensor::FromI32({rows}, ids), d_rows, &expected));
    EXPECT_TRUE(SameBytes(OnHost(table), expected)) << rows << " " << vocab << " " << width;
  }
}

// More tensors than one launch takes, of sizes around those of a block's share.
TEST_P(CudaTrainTest, OptimizerOverManyTensors) {
  std::vector<Tensor> gradients, on_gpu;
  std::vector<AdamWUpdate> updates, expected;
  for (int i = 0; i < 150; ++i) {
    const Shape shape = i % 4 == 0   ? Shape{1}
                        : i % 4 == 1 ? Shape{64, 64}
                        : i % 4 == 2 ? Shape{70 + i, 233}
                                     : Shape{8192 + i - 3};
    AdamWUpdate update;
    update.step.rate = 0.01 * (1 + i % 3);
    update.step.decay = 0.1 * (i % 2);
    update.step.step = 3;
    update.step.gradient_scale = 0.5f;
    const uint32_t seed = static_cast<uint32_t>(5 * i);
    update.gradient = Gradient(shape, seed);
    update.master = Gradient(shape, seed + 1);
    update.first_moment = Gradient(shape, seed + 2);
    update.second_moment = Gradient(shape, seed + 3);
    for (int64_t k = 0; k < shape.elements(); ++k) {
      update.second_moment.as<float>()[k] *= update.second_moment.as<float>()[k];
    }
    update.stored = Garbage(shape, dtype());
    if (i % 3 > 0) update.average = Gradient(shape, seed + 4);
    update.step.average_keep = 0.3;
    gradients.push_back(Clone(update.gradient));
    expected.push_back(update);
    for (Tensor* tensor : {&update.gradient, &update.master, &update.first_moment,
                           &update.second_moment, &update.stored, &update.average}) {
      if (!tensor->empty()) *tensor = OnGpu(*tensor);
    }
    on_gpu.push_back(update.gradient);
    updates.push_back(update);
  }
  const double squares = cpu().SumOfSquares(gradients).value();
  EXPECT_NEAR(gpu().SumOfSquares(on_gpu).value(), squares, 1e-12 * squares);
  EXPECT_NEAR(gpu().SumOfSquares({on_gpu[2]}).value(), cpu().SumOfSquares({gradients[2]}).value(),
              1e-12 * squares);
  QM_ASSERT_OK(gpu().AdamW(updates));
  QM_ASSERT_OK(cpu().AdamW(expected));
  for (size_t i = 0; i < updates.size(); ++i) {
    ExpectClose("parameter", updates[i].master, expected[i].master, 1e-5);
    ExpectClose("first moment", updates[i].first_moment, expected[i].first_moment, 1e-6);
    ExpectClose("second moment", updates[i].second_moment, expected[i].second_moment, 1e-6);
    if (!updates[i].average.empty()) {
      ExpectClose("mean", updates[i].average, expected[i].average, 1e-5);
    }
    Tensor rounded = Garbage(updates[i].stored.shape(), dtype());
    const Tensor master = OnHost(updates[i].master);
    for (int64_t k = 0; k < rounded.elements(); ++k) {
      StoreFloat(rounded, k, master.as<float>()[k]);
    }
    EXPECT_TRUE(SameBytes(OnHost(updates[i].stored), rounded)) << i;
    for (double value : Values(OnHost(updates[i].gradient))) ASSERT_EQ(value, 0);
  }
}

// The blocks, and the final norm, head and loss around them. The gradient of the divergence is a
// difference of two probabilities of like size, which doubles the relative error.
TEST_P(CudaTrainTest, ModelsAgreeWithPyTorch) {
  for (const std::string& name : GradientFixtureNames()) {
    const GradientFixture fixture(name);
    const double roundings = kBlockRoundings * static_cast<double>(fixture.config().layers) + 4;
    for (const std::string loss : {"lm", "kl"}) {
      const double tolerance = dtype() == DType::kF32
                                   ? 1e-4
                                   : (loss == "kl" ? 2 : 1) * roundings * UnitRoundoff(dtype());
      for (const NamedError& e : ModelErrors(fixture, loss, cuda())) {
        EXPECT_LT(e.error, tolerance) << name << " " << loss << " " << e.name;
      }
    }
  }
}

QM_CUDA_TEST_SUITE(CudaTrainTest);

}  // namespace
}  // namespace quantmill::testing
