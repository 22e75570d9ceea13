// What the estimates count, on the quickstart model: 4 blocks of 196608 weights, hidden 128,
// vocabulary 2048. How well the sum fits the clock is no test's business.
#include "host/run/time_estimate.h"

#include "core/model/config.h"
#include "gtest/gtest.h"
#include "host/run/preflight.h"
#include "host/run/train/train_checks.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

constexpr double kBlockWeights = 196608, kHeadWeights = 128.0 * 2048;

class TimeEstimateTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto config = ReadModelConfig(testing::SourcePath("configs/quickstart/tiny-llama"));
    ASSERT_TRUE(config.ok()) << config.status();
    plan_.config = *config;
    plan_.slots = AllSlots(plan_.config);
    plan_.packed_by.assign(plan_.slots.size(), 0);
    CalibrationSection calibration;
    calibration.text = "/calib.txt";
    calibration.samples = 8;
    calibration.sequence_length = 64;
    plan_.pipeline.calibration = calibration;
    Pipeline::Evaluate evaluate;
    evaluate.context = 64;
    plan_.pipeline.evaluate = evaluate;
  }

  // One stage on every slot that asks for the Hessian.
  StageSet HessianStage(bool sequential) {
    planned_ = PlannedStage();
    for (size_t i = 0; i < plan_.slots.size(); ++i) planned_.slots.push_back(static_cast<int>(i));
    PreparedStage stage;
    stage.stage = &planned_;
    stage.needs_statistics = stage.uses_quantized_stream = true;
    stage.sequential = sequential;
    for (const LinearSlot& slot : plan_.slots) {
      SlotPlan& slot_plan = stage.method.plans.emplace_back();
      slot_plan.flops = 1000;
      slot_plan.stats.push_back({{slot.input_group, StatKind::kHessian, 0, false}, false});
    }
    StageSet stages;
    stages.stages.push_back(std::move(stage));
    return stages;
  }

  PipelinePlan plan_;
  PlannedStage planned_;
};

TEST_F(TimeEstimateTest, EvaluationRunsBlocksAndHeadOfBothModels) {
  const RunWork work = EvaluationWork(plan_, 2);
  const double rows = 128;
  EXPECT_DOUBLE_EQ(work.products, 2 * 2 * rows * (4 * kBlockWeights + kHeadWeights));
  EXPECT_DOUBLE_EQ(work.attention, 2 * 4 * 4 * rows * 32 * 128);  // 32 positions seen on average
  plan_.pipeline.evaluate->reference = false;
  EXPECT_DOUBLE_EQ(EvaluationWork(plan_, 2).products, work.products / 2);
  EXPECT_LT(EvaluationWork(plan_, 2).exponentials, work.exponentials / 2);
  EXPECT_DOUBLE_EQ(EvaluationWork(plan_, 4).products, work.products);
  EXPECT_EQ(EvaluationWork(plan_, 0).products, 0);
}

TEST_F(TimeEstimateTest, DrawingTextIsCountedWhenItIsDrawn) {
  EXPECT_EQ(DrawingWork(plan_, {}).few_rows, 0);
  plan_.pipeline.calibration->text = "self";
  const RunWork work = DrawingWork(plan_, {});
  EXPECT_DOUBLE_EQ(work.few_rows, 2.0 * 8 * 64 * (4 * kBlockWeights + kHeadWeights));
  EXPECT_GT(work.steps, 0);
  // 8 x 64 tokens see 32 on average, with 4 x 2 x kv_features numbers of 4 bytes each.
  EXPECT_DOUBLE_EQ(work.cached,
                   8.0 * 64 * 32 * 4 * 2 * 4 * static_cast<double>(plan_.config.kv_features()));
  plan_.pipeline.calibration->samples = 64;
  EXPECT_DOUBLE_EQ(DrawingWork(plan_, {}).few_rows, 8 * work.few_rows);
  // Without statistics no text is drawn.
  const RunWork total = TotalWork(plan_, StageSet(), RunExtent());
  EXPECT_EQ(total.few_rows, 0);
}

TEST_F(TimeEstimateTest, MeasuringRunsEachBlockOnceMoreThanItsOutputs) {
  const RunWork work = QuantizingWork(plan_, HessianStage(false));
  const double rows = 8 * 64;
  const double grams = 4 * 2 * rows * (3 * 128.0 * 128 + 384.0 * 384);  // q/k/v, o, gate/up; down
  // Up to the input of down in four blocks, to the end in the three that another block follows.
  const double passes = 2 * rows * (4 * (kBlockWeights - 128.0 * 384) + 3 * kBlockWeights);
  const double judged = 4 * static_cast<double>(kOutputSampleRows) * 4 * kBlockWeights;
  EXPECT_DOUBLE_EQ(work.products, grams + passes + judged);
  EXPECT_DOUBLE_EQ(work.method, 28 * 1000);

  // In true sequence each group has a pass of its own up to where it stands.
  const RunWork sequential = QuantizingWork(plan_, HessianStage(true));
  EXPECT_GT(sequential.products, work.products);
  EXPECT_LT(sequential.products, 2 * work.products);
}

TEST_F(TimeEstimateTest, BothStreamsTakeTwiceThePasses) {
  StageSet stages = HessianStage(false);
  const double one = QuantizingWork(plan_, stages).attention;
  stages.stages[0].uses_original_stream = true;
  EXPECT_DOUBLE_EQ(QuantizingWork(plan_, stages).attention, 2 * one);
}

// A rotation of 100 parameters on every slot costs flops of its own, a trained weight does not.
TEST_F(TimeEstimateTest, AdaptersCountBesideTheModel) {
  StageSet stages = HessianStage(false);
  PreparedStage& stage = stages.stages[0];
  TrainOptions train;
  train.tokens = 1000;
  planned_.train = train;
  stage.trains = true;
  ReparamPlan adapter;
  adapter.kind = QM_REPARAM_WEIGHT;
  adapter.params.push_back({"q", Shape({10, 10})});
  stage.block_plans.resize(plan_.slots.size());
  stage.model_plans.assign(plan_.slots.size(), adapter);
  const RunWork weights = TrainingWork(plan_, stages, {});
  EXPECT_EQ(weights.method, 0);
  EXPECT_GT(weights.products, 0);
  adapter.kind = QM_REPARAM_INPUT;
  stage.model_plans.assign(plan_.slots.size(), adapter);
  const RunWork rotations = TrainingWork(plan_, stages, {});
  EXPECT_DOUBLE_EQ(rotations.method, 16.0 * 100 * static_cast<double>(plan_.slots.size()) *
                                         static_cast<double>(train.tokens));
  EXPECT_DOUBLE_EQ(rotations.products, weights.products);
}

// Four bytes for each trained value: weights, embedding (which is the head, too) and parameters of
// the method.
TEST_F(TimeEstimateTest, RunningMeansTakeMemory) {
  StageSet stages = HessianStage(false);
  PreparedStage& stage = stages.stages[0];
  ReparamPlan trained;
  trained.kind = QM_REPARAM_WEIGHT;
  trained.weight_rate = 1;
  trained.params.push_back({"scale", Shape({10, 10})});
  stage.trains = true;
  stage.block_plans.resize(plan_.slots.size());
  stage.model_plans.assign(plan_.slots.size(), trained);
  const auto bytes = [&](double average) {
    TrainOptions train;
    train.tokens = 10 * train.batch * train.sequence_length;
    train.average = average;
    planned_.train = train;
    return static_cast<double>(TrainingBytes(plan_, stage, {}, 1000));
  };
  const double values =
      4 * kBlockWeights + kHeadWeights + 100 * static_cast<double>(plan_.slots.size());
  EXPECT_EQ(bytes(0.5) - bytes(0), 4 * values);
  EXPECT_EQ(bytes(0.1), bytes(0));  // a mean over one step is the last value
}

TEST_F(TimeEstimateTest, EveryKindOfWorkTakesTime) {
  double RunWork::*const kinds[] = {
      &RunWork::products,    &RunWork::few_rows,     &RunWork::attention, &RunWork::method,
      &RunWork::activations, &RunWork::exponentials, &RunWork::weights,   &RunWork::bytes,
      &RunWork::text_bytes,  &RunWork::steps,        &RunWork::cached};
  for (double RunWork::*const kind : kinds) {
    const bool on_gpu = kind == &RunWork::cached;
    const double nothing = SecondsFor(RunWork(), 1e11, on_gpu, 2);
    RunWork work;
    work.*kind = 1e13;
    EXPECT_GT(SecondsFor(work, 1e11, on_gpu, 2), nothing + 1);
    RunWork twice = work;
    twice += work;
    EXPECT_NEAR(SecondsFor(twice, 1e11, on_gpu, 2) - nothing,
                2 * (SecondsFor(work, 1e11, on_gpu, 2) - nothing), 1e-6 * (twice.*kind));
    EXPECT_LE(SecondsFor(work, 1e12, on_gpu, 4), SecondsFor(work, 1e11, on_gpu, 2));
  }
}

// States of every window of both models, F32 [64, 128] each on the CPU.
TEST_F(TimeEstimateTest, EvaluationKeepsTheStatesOfAllWindows) {
  const auto checkpoint = Checkpoint::Open(testing::SourcePath("configs/quickstart/tiny-llama"));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto backend = MakeCpuBackend(1).value();
  const auto peak = [&](int64_t windows, bool reference) {
    plan_.pipeline.evaluate->reference = reference;
    PlanReport report;
    AddEvaluation(plan_, **checkpoint, windows, *backend, &report);
    EXPECT_EQ(report.peak_device_bytes, 0);
    return static_cast<double>(report.peak_host_bytes);
  };
  const double state = 64.0 * 128 * 4;
  EXPECT_NEAR(peak(30000, false) - peak(10000, false), 20000 * state, 0.01 * 20000 * state);
  EXPECT_NEAR(peak(10000, true) - peak(10000, false), 10000 * state, 0.01 * 10000 * state);
  // A peak that another phase has is kept.
  PlanReport higher;
  higher.peak_host_bytes = int64_t{1} << 50;
  AddEvaluation(plan_, **checkpoint, 1, *backend, &higher);
  EXPECT_EQ(higher.peak_host_bytes, int64_t{1} << 50);
}

TEST_F(TimeEstimateTest, ProductRateIsMeasured) {
  const auto backend = MakeCpuBackend(1);
  ASSERT_TRUE(backend.ok());
  const auto rate = MeasureProductRate(**backend);
  ASSERT_TRUE(rate.ok()) << rate.status();
  EXPECT_GT(*rate, 1e6);
  EXPECT_LT(*rate, 1e14);
}

}  // namespace
}  // namespace quantmill
