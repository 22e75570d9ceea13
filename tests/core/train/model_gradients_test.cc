// Gradients of whole models against PyTorch's, and training steps against a slow AdamW.
#include "core/train/model_gradients.h"

#include "core/train/adamw.h"
#include "gmock/gmock.h"
#include "tests/core/train/fixtures.h"

namespace quantmill::testing {
namespace {

using ::testing::HasSubstr;

struct ModelRig {
  explicit ModelRig(const std::string& name, int threads = 2)
      : fixture(name),
        backend(MakeCpuBackend(threads).value()),
        ops(MakeTrainingOps(*backend).value()),
        batch(FixtureBatch(fixture)),
        model(LoadTrainedModel(*fixture.source, batch.ids.dim(1), *backend).value()) {}

  GradientFixture fixture;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<TrainingOps> ops;
  TrainingBatch batch;
  TrainedModel model;
};

class ModelGradientsTest : public ::testing::TestWithParam<std::string> {};

TEST_P(ModelGradientsTest, AgreeWithPyTorch) {
  const GradientFixture fixture(GetParam());
  const auto backend = MakeCpuBackend(2).value();
  for (const char* loss : {"lm", "kl"}) {
    for (const NamedError& e : ModelErrors(fixture, loss, *backend)) {
      EXPECT_LT(e.error, 1e-4) << loss << " " << e.name;
    }
  }
}

TEST_P(ModelGradientsTest, DoNotDependOnThreads) {
  ModelRig one(GetParam(), 1), three(GetParam(), 3);
  const auto a = WantedGradients(one.fixture, *one.backend);
  const auto b = WantedGradients(three.fixture, *three.backend);
  for (auto [rig, wanted] : {std::pair{&one, &a}, std::pair{&three, &b}}) {
    ModelGradients places = PlaceModelGradients(rig->model, *wanted).value();
    ASSERT_TRUE(
        AddModelGradients(*rig->ops, rig->model, rig->batch, {0.5f, 0.25f}, 2, &places).ok());
  }
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_TRUE(SameBytes(a[i].tensor, b[i].tensor)) << a[i].name;
  }
}

INSTANTIATE_TEST_SUITE_P(Architectures, ModelGradientsTest,
                         ::testing::ValuesIn(GradientFixtureNames()),
                         [](const auto& info) { return TestNameOf(info.param); });

TEST(ModelGradientsErrors, NameWhatIsWrong) {
  ModelRig rig("llama");
  const auto wanted = WantedGradients(rig.fixture, *rig.backend);
  EXPECT_EQ(PlaceModelGradients(rig.model, {{{"model.nothing", wanted[0].tensor}}}).status().code(),
            absl::StatusCode::kNotFound);
  ModelGradients places = PlaceModelGradients(rig.model, {}).value();
  const auto run = [&](const TrainingBatch& batch) {
    return AddModelGradients(*rig.ops, rig.model, batch, {}, 1, &places).status();
  };
  TrainingBatch masked = rig.batch;
  masked.targets = Tensor::FromI32({1, 2}, {-1, -1});
  masked.ids = Tensor::FromI32({1, 2}, {1, 2});
  EXPECT_EQ(run(masked).code(), absl::StatusCode::kFailedPrecondition);
  TrainingBatch wrong = masked;
  wrong.ids = Tensor::FromI32({1, 2}, {1, 40});
  EXPECT_THAT(std::string(run(wrong).message()), HasSubstr("ids of a batch hold 40"));
  wrong.ids = Tensor::FromI32({1, 3}, {1, 2, 3});
  EXPECT_EQ(run(wrong).code(), absl::StatusCode::kInvalidArgument);
}

// A few steps on one batch: the loss falls, and a parameter moves as the formulas say in f64.
TEST(TrainingStep, FollowsAdamW) {
  ModelRig rig("qwen3");
  std::vector<std::string> names;
  for (const NamedTensor& item : WantedGradients(rig.fixture, *rig.backend)) {
    names.push_back(item.name);
  }
  // Weights of the fixture are mapped read-only: trained ones are copies.
  const auto writable = [](Tensor* tensor) { *tensor = Clone(*tensor); };
  for (int64_t block = 0; block < rig.model.config->layers; ++block) {
    const BlockTensors tensors(*rig.model.config, block,
                               &rig.model.blocks[static_cast<size_t>(block)]);
    for (const auto& [name, tensor] : tensors.all()) writable(tensor);
  }
  for (Tensor* tensor : {&rig.model.embedding, &rig.model.final_norm, &rig.model.head.dense}) {
    writable(tensor);
  }
  AdamWOptions options;
  options.decay = 0.1;
  options.clip_norm = 0.05;
  AdamW optimizer(*rig.ops, options);
  for (const std::string& name : names) {
    ASSERT_TRUE(optimizer.Add(name, *FindTensor(rig.model, name), 1, true).ok()) << name;
  }
  ModelGradients places = PlaceModelGradients(rig.model, optimizer.gradients()).value();
  const std::string watched = "model.layers.1.mlp.up_proj.weight";
  const Tensor& value = *FindTensor(rig.model, watched);
  Doubles p = Values(value), m(p.size()), v(p.size());
  double first = 0, last = 0;
  constexpr double kRate = 0.01;
  for (int step = 1; step <= 5; ++step) {
    double norm = 0;
    for (int accumulated = 0; accumulated < 2; ++accumulated) {
      const BatchLoss loss =
          AddModelGradients(*rig.ops, rig.model, rig.batch, {}, 1, &places).value();
      (step == 1 ? first : last) = loss.lm;
    }
    Doubles g;
    for (const NamedTensor& gradient : optimizer.gradients()) {
      for (double x : Values(gradient.tensor)) norm += x * x / 4;
      if (gradient.name == watched) g = Values(gradient.tensor);
    }
    norm = std::sqrt(norm);
    const OptimizerStep done = optimizer.Step(kRate, 2).value();
    EXPECT_NEAR(done.gradient_norm, norm, 1e-5 * norm);
    ASSERT_GT(norm, options.clip_norm);
    for (size_t i = 0; i < p.size(); ++i) {
      const double clipped = g[i] / 2 * options.clip_norm / norm;
      m[i] = 0.9 * m[i] + 0.1 * clipped;
      v[i] = 0.999 * v[i] + 0.001 * clipped * clipped;
      p[i] -= kRate * options.decay * p[i];
      p[i] -= kRate * (m[i] / (1 - std::pow(0.9, step))) /
              (std::sqrt(v[i] / (1 - std::pow(0.999, step))) + 1e-8);
    }
    EXPECT_LT(RelativeError(Values(value), p), 1e-5) << step;
  }
  EXPECT_LT(last, 0.9 * first);
}

// Means over three steps: of all values at first, then exponential ones; where the training ends.
TEST(TrainingStep, EndsWithTheMeansOfItsParameters) {
  const auto backend = MakeCpuBackend(1).value();
  const auto ops = MakeTrainingOps(*backend).value();
  for (const double average_steps : {0.0, 1.0, 3.0}) {
    Tensor weight = Tensor::FromF32({2}, {1, 2});
    AdamWOptions options;
    options.average_steps = average_steps;
    AdamW optimizer(*ops, options);
    ASSERT_TRUE(optimizer.Add("w", weight, 1, true).ok());
    ASSERT_TRUE(optimizer.StoreAverages().ok());
    EXPECT_EQ(Values(weight), (Doubles{1, 2})) << "before the first step";
    std::vector<Doubles> after;
    for (int step = 0; step < 5; ++step) {
      Tensor gradient = optimizer.gradients()[0].tensor;
      gradient.as<float>()[0] = static_cast<float>(step - 1);
      gradient.as<float>()[1] = 0.5f;
      ASSERT_TRUE(optimizer.Step(0.1).ok());
      after.push_back(Values(weight));
    }
    Doubles expected = after.back();
    for (size_t k = 0; average_steps > 1 && k < expected.size(); ++k) {
      const double first_three = (after[0][k] + after[1][k] + after[2][k]) / 3;
      expected[k] = (2 * (2 * first_three + after[3][k]) / 3 + after[4][k]) / 3;
    }
    EXPECT_EQ(optimizer.State().size(), average_steps > 1 ? 4u : 3u);
    ASSERT_TRUE(optimizer.StoreAverages().ok());
    EXPECT_LT(RelativeError(Values(weight), expected), 1e-6) << average_steps;
  }
}

TEST(TrainingStep, GradientThatIsNotFiniteChangesNothing) {
  const auto backend = MakeCpuBackend(1).value();
  const auto ops = MakeTrainingOps(*backend).value();
  Tensor weight = Tensor::FromF32({2}, {1, 2});
  AdamW optimizer(*ops, {});
  ASSERT_TRUE(optimizer.Add("w", weight, 1, true).ok());
  Tensor gradient = optimizer.gradients()[0].tensor;
  gradient.as<float>()[1] = NAN;
  EXPECT_TRUE(optimizer.Step(0.1).value().skipped);
  EXPECT_EQ(Values(weight), (Doubles{1, 2}));
  EXPECT_EQ(Values(gradient), (Doubles{0, 0}));
  EXPECT_EQ(optimizer.steps(), 0);
}

}  // namespace
}  // namespace quantmill::testing
