#include "core/calib/calibration.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/core/model/compare.h"
#include "tests/core/model/random_model.h"
#include "tests/core/model/slow_statistics.h"

namespace quantmill {
namespace {

using ::nlohmann::ordered_json;
using testing::ExpectNear;
using testing::FloatTolerance;
using testing::Gram;
using ::testing::HasSubstr;
using testing::MakeRandomModel;
using testing::Matrix;
using testing::MaxAbs;
using testing::MemorySource;
using testing::SlowInputs;
using testing::SmallConfig;
using testing::Subtract;

constexpr int64_t kWindows = 5;
constexpr int64_t kLength = 12;
constexpr int64_t kVocab = 64;

StatRequest Hessian(int group) { return {group, StatKind::kHessian, 0, false}; }
StatRequest Cross(int group) { return {group, StatKind::kCross, 0, false}; }
StatRequest AbsMean(int group) { return {group, StatKind::kAbsMean, 0, false}; }
StatRequest AbsMax(int group) { return {group, StatKind::kAbsMax, 0, false}; }
StatRequest Rows(int group, int64_t max) { return {group, StatKind::kRows, max, false}; }
StatRequest FromOriginal(StatRequest request) {
  request.from_original = true;
  return request;
}

// ---- naive f64 statistics of the slow reference's inputs --------------------------------------

Matrix AbsoluteMean(const Matrix& x) {
  std::vector<double> mean(x[0].size(), 0.0);
  for (const auto& row : x) {
    for (size_t i = 0; i < row.size(); ++i) {
      mean[i] += std::abs(row[i]) / static_cast<double>(x.size());
    }
  }
  return {mean};
}

Matrix AbsoluteMax(const Matrix& x) {
  std::vector<double> largest(x[0].size(), 0.0);
  for (const auto& row : x) {
    for (size_t i = 0; i < row.size(); ++i) largest[i] = std::max(largest[i], std::abs(row[i]));
  }
  return {largest};
}

// Rows 0, s, 2s, ... as STATS.md says.
Matrix Strided(const Matrix& x, size_t max_rows) {
  const size_t stride = std::max<size_t>(1, x.size() / max_rows);
  Matrix rows;
  for (size_t i = 0; i < x.size() && rows.size() < max_rows; i += stride) rows.push_back(x[i]);
  return rows;
}

Tensor AsMatrix(const Tensor& tensor) {
  return tensor.rank() == 2 ? tensor : tensor.Reshaped({1, tensor.elements()});
}

// A model, its windows and a calibration over them.
struct CalibrationRig {
  explicit CalibrationRig(ordered_json json, CalibrationOptions options = {}, uint64_t seed = 11)
      : config_json(std::move(json)),
        source(MakeRandomModel(config_json, seed)),
        backend(MakeCpuBackend(2).value()),
        windows(Tensor::FromI32({kWindows, kLength},
                                testing::RandomIds(kWindows * kLength, kVocab, seed + 1))) {
    const Tensor embedding = source->Embedding().value();
    calibration =
        Calibration::Create(*backend, source->config(), windows, embedding, options).value();
  }
  BlockWeights Block(int64_t index) { return source->LoadBlock(index, *backend).value(); }
  // The block with every linear's weights moved a little, as quantization would.
  BlockWeights Disturbed(int64_t index) {
    BlockWeights weights = Block(index);
    for (const LinearSlot& slot : BlockSlots(source->config(), index)) {
      LinearWeight* weight = weights.At(slot);
      weight->dense = Coarse(weight->dense);
    }
    return weights;
  }
  static Tensor Coarse(const Tensor& tensor) {
    Tensor coarse = Tensor::Host(DType::kF32, tensor.shape()).value();
    for (int64_t i = 0; i < tensor.elements(); ++i) {
      coarse.as<float>()[i] = std::round(tensor.as<float>()[i] * 8.0f) / 8.0f;
    }
    return coarse;
  }
  // The same model with block `index` disturbed, for the slow reference.
  std::unique_ptr<MemorySource> DisturbedModel(int64_t index) {
    auto tensors = source->tensors();
    for (const LinearSlot& slot : BlockSlots(source->config(), index)) {
      Tensor& weight = tensors[slot.name + ".weight"];
      weight = Coarse(weight);
    }
    return std::make_unique<MemorySource>(source->config(), tensors);
  }

  ordered_json config_json;
  std::unique_ptr<MemorySource> source;
  std::unique_ptr<Backend> backend;
  Tensor windows;
  std::unique_ptr<Calibration> calibration;
};

CalibrationOptions TwoStreams() {
  CalibrationOptions options;
  options.keep_original = true;
  return options;
}

// Statistics are sums over kWindows * kLength rows of products of inputs that went through up to
// two blocks.
double StatTolerance(const Matrix& expected) { return FloatTolerance(64, 40, MaxAbs(expected)); }

void ExpectStat(const Statistics& statistics, const StatRequest& request, const Matrix& expected) {
  const Tensor* value = statistics.Find(request);
  ASSERT_NE(value, nullptr) << StatId(request.kind) << " of group " << request.input_group;
  ExpectNear(AsMatrix(*value), expected, StatTolerance(expected));
}

// ---- one stream ---------------------------------------------------------------------------------

class CalibrationBatch : public ::testing::TestWithParam<int64_t> {};

TEST_P(CalibrationBatch, StatisticsOfEveryGroupAgreeWithNaiveSums) {
  CalibrationOptions options;
  options.batch_rows = GetParam();
  CalibrationRig rig(SmallConfig("llama"), options);
  const auto inputs = SlowInputs(rig.config_json, *rig.source, rig.windows);
  const std::vector<std::string> modules = {"self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj",
                                            "mlp.down_proj"};
  for (int64_t block = 0; block < 2; ++block) {
    std::vector<StatRequest> requests;
    for (int group = 0; group < 4; ++group) {
      for (const StatRequest& request :
           {Hessian(group), AbsMean(group), AbsMax(group), Rows(group, 7), Rows(group, 1000)}) {
        requests.push_back(request);
      }
    }
    Statistics statistics;
    const absl::Status status =
        rig.calibration->Collect(rig.Block(block), nullptr, requests, &statistics);
    ASSERT_TRUE(status.ok()) << status;
    for (int group = 0; group < 4; ++group) {
      const Matrix& x = inputs.at(BlockName(block) + "." + modules[static_cast<size_t>(group)]);
      EXPECT_EQ(statistics.RowCount(group), kWindows * kLength);
      ExpectStat(statistics, Hessian(group), Gram(x, x));
      ExpectStat(statistics, AbsMean(group), AbsoluteMean(x));
      ExpectStat(statistics, AbsMax(group), AbsoluteMax(x));
      ExpectStat(statistics, Rows(group, 7), Strided(x, 7));
      ExpectStat(statistics, Rows(group, 1000), Strided(x, 1000));
    }
    ASSERT_TRUE(rig.calibration->Advance(rig.Block(block), nullptr).ok());
  }
  EXPECT_EQ(rig.calibration->block(), 2);
}

INSTANTIATE_TEST_SUITE_P(Rows, CalibrationBatch, ::testing::Values(1, 2 * kLength, 10000));

TEST(CalibrationTest, WhereTheHiddenStatesLiveChangesNothing) {
  std::vector<Tensor> values;
  for (bool on_device : {true, false}) {
    CalibrationOptions options;
    options.hidden_on_device = on_device;
    CalibrationRig rig(SmallConfig("llama"), options);
    Statistics statistics;
    ASSERT_TRUE(rig.calibration->Collect(rig.Block(0), nullptr, {Hessian(3)}, &statistics).ok());
    values.push_back(*statistics.Find(Hessian(3)));
  }
  for (int64_t i = 0; i < values[0].elements(); ++i) {
    ASSERT_EQ(values[0].as<float>()[i], values[1].as<float>()[i]);
  }
}

TEST(CalibrationTest, OnlyRequestedStatisticsAreThere) {
  CalibrationRig rig(SmallConfig("llama"));
  Statistics statistics;
  ASSERT_TRUE(rig.calibration->Collect(rig.Block(0), nullptr, {AbsMax(1)}, &statistics).ok());
  EXPECT_NE(statistics.Find(AbsMax(1)), nullptr);
  EXPECT_EQ(statistics.Find(AbsMax(0)), nullptr);
  EXPECT_EQ(statistics.Find(Hessian(1)), nullptr);
  EXPECT_EQ(statistics.Find(FromOriginal(AbsMax(1))), nullptr);
  EXPECT_EQ(statistics.RowCount(3), 0);
}

TEST(CalibrationTest, CollectLeavesTheStatesAlone) {
  CalibrationRig rig(SmallConfig("llama"));
  const Tensor before = rig.calibration->Input(2, false).value();
  Statistics statistics;
  ASSERT_TRUE(rig.calibration->Collect(rig.Block(0), nullptr, {Hessian(3)}, &statistics).ok());
  const Tensor after = rig.calibration->Input(2, false).value();
  for (int64_t i = 0; i < before.elements(); ++i) {
    ASSERT_EQ(before.as<float>()[i], after.as<float>()[i]);
  }
}

// With the attention already replaced, the MLP's inputs are those of the changed model.
TEST(CalibrationTest, TrueSequentialSeesReplacedSlots) {
  CalibrationRig rig(SmallConfig("llama"));
  auto tensors = rig.source->tensors();
  BlockWeights weights = rig.Block(0);
  for (const auto& [module, weight] :
       {std::pair("q_proj", &weights.q), {"v_proj", &weights.v}, {"o_proj", &weights.o}}) {
    weight->dense = CalibrationRig::Coarse(weight->dense);
    tensors[std::string("model.layers.0.self_attn.") + module + ".weight"] = weight->dense;
  }
  const MemorySource changed(rig.source->config(), tensors);
  const auto inputs = SlowInputs(rig.config_json, changed, rig.windows);
  Statistics statistics;
  ASSERT_TRUE(rig.calibration->Collect(weights, nullptr, {Hessian(2)}, &statistics).ok());
  const Matrix& x = inputs.at("model.layers.0.mlp.gate_proj");
  ExpectStat(statistics, Hessian(2), Gram(x, x));
}

// ---- two streams --------------------------------------------------------------------------------

TEST(CalibrationTest, CrossAndOriginalStatistics) {
  CalibrationRig rig(SmallConfig("llama"), TwoStreams());
  const auto original = SlowInputs(rig.config_json, *rig.source, rig.windows);
  // Block 0 is quantized, block 1 not yet.
  const auto quantized = SlowInputs(rig.config_json, *rig.DisturbedModel(0), rig.windows);
  const BlockWeights untouched = rig.Block(0);
  ASSERT_TRUE(rig.calibration->Advance(rig.Disturbed(0), &untouched).ok());
  std::vector<StatRequest> requests;
  for (int group = 0; group < 4; ++group) {
    for (const StatRequest& request : {Hessian(group), Cross(group), FromOriginal(AbsMean(group)),
                                       AbsMean(group), FromOriginal(Rows(group, 4))}) {
      requests.push_back(request);
    }
  }
  Statistics statistics;
  ASSERT_TRUE(rig.calibration->Collect(rig.Block(1), nullptr, requests, &statistics).ok());
  const std::vector<std::string> modules = {"self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj",
                                            "mlp.down_proj"};
  for (int group = 0; group < 4; ++group) {
    const std::string name = "model.layers.1." + modules[static_cast<size_t>(group)];
    const Matrix &x = quantized.at(name), &y = original.at(name);
    ExpectStat(statistics, Hessian(group), Gram(x, x));
    ExpectStat(statistics, AbsMean(group), AbsoluteMean(x));
    ExpectStat(statistics, FromOriginal(AbsMean(group)), AbsoluteMean(y));
    ExpectStat(statistics, FromOriginal(Rows(group, 4)), Strided(y, 4));
    const Matrix cross = Gram(Subtract(y, x), x);
    const Tensor* value = statistics.Find(Cross(group));
    ASSERT_NE(value, nullptr);
    // The difference is small against its operands, so that the error is judged by them.
    ExpectNear(*value, cross, StatTolerance(Gram(x, x)));
    EXPECT_GT(MaxAbs(cross), 100 * StatTolerance(Gram(x, x))) << "a test that shows nothing";
    EXPECT_EQ(statistics.RowCount(group, true), kWindows * kLength);
  }
}

TEST(CalibrationTest, WithoutAnyChangeCrossIsZero) {
  CalibrationRig rig(SmallConfig("llama"), TwoStreams());
  Statistics statistics;
  ASSERT_TRUE(rig.calibration
                  ->Collect(rig.Block(0), nullptr, {Cross(1), FromOriginal(AbsMean(1)), AbsMean(1)},
                            &statistics)
                  .ok());
  const Tensor* cross = statistics.Find(Cross(1));
  ASSERT_NE(cross, nullptr);
  for (int64_t i = 0; i < cross->elements(); ++i) ASSERT_EQ(cross->as<float>()[i], 0.0f);
  EXPECT_EQ(statistics.RowCount(1), kWindows * kLength);
  const Tensor *a = statistics.Find(AbsMean(1)), *b = statistics.Find(FromOriginal(AbsMean(1)));
  ASSERT_NE(b, nullptr);
  for (int64_t i = 0; i < a->elements(); ++i) ASSERT_EQ(a->as<float>()[i], b->as<float>()[i]);
}

TEST(CalibrationTest, StreamsAdvanceWithTheirOwnWeights) {
  CalibrationRig rig(SmallConfig("llama"), TwoStreams());
  const BlockWeights untouched = rig.Block(0), changed = rig.Disturbed(0);
  const Tensor expected = rig.calibration->Output(untouched, 3, true).value();
  const Tensor expected_changed = rig.calibration->Output(changed, 3, false).value();
  ASSERT_TRUE(rig.calibration->Advance(changed, &untouched).ok());
  const Tensor original = rig.calibration->Input(3, true).value();
  const Tensor quantized = rig.calibration->Input(3, false).value();
  double difference = 0;
  for (int64_t i = 0; i < original.elements(); ++i) {
    ASSERT_NEAR(original.as<float>()[i], expected.as<float>()[i], 1e-4);
    ASSERT_NEAR(quantized.as<float>()[i], expected_changed.as<float>()[i], 1e-4);
    difference =
        std::max<double>(difference, std::abs(original.as<float>()[i] - quantized.as<float>()[i]));
  }
  EXPECT_GT(difference, 1e-2);
}

// ---- mixture of experts -------------------------------------------------------------------------

ordered_json ExpertConfig() {
  return SmallConfig("mixtral", {{"num_local_experts", 6}, {"num_experts_per_tok", 2}});
}

TEST(CalibrationTest, ExpertsCountTheirOwnRows) {
  CalibrationRig rig(ExpertConfig());
  const auto inputs = SlowInputs(rig.config_json, *rig.source, rig.windows);
  std::vector<StatRequest> requests;
  for (int group = 2; group < 14; ++group) {
    requests.push_back(Hessian(group));
    requests.push_back(AbsMean(group));
    requests.push_back(Rows(group, 5));
  }
  Statistics statistics;
  ASSERT_TRUE(rig.calibration->Collect(rig.Block(0), nullptr, requests, &statistics).ok());
  int64_t total = 0;
  for (int expert = 0; expert < 6; ++expert) {
    const std::string prefix =
        "model.layers.0.block_sparse_moe.experts." + std::to_string(expert) + ".";
    const int group = 2 + 2 * expert;
    ASSERT_TRUE(inputs.contains(prefix + "w1"));
    for (int part : {0, 1}) {
      const Matrix& x = inputs.at(prefix + (part == 0 ? "w3" : "w2"));
      EXPECT_EQ(statistics.RowCount(group + part), static_cast<int64_t>(x.size()));
      ExpectStat(statistics, Hessian(group + part), Gram(x, x));
      ExpectStat(statistics, AbsMean(group + part), AbsoluteMean(x));
      ExpectStat(statistics, Rows(group + part, 5), Strided(x, 5));
    }
    total += statistics.RowCount(group);
  }
  EXPECT_EQ(total, kWindows * kLength * 2);
}

TEST(CalibrationTest, ExpertNobodyVisited) {
  CalibrationRig rig(ExpertConfig());
  BlockWeights weights = rig.Block(0);
  // A router of zeros ties all experts: the lowest two are taken for every row.
  weights.moe.router.dense =
      Tensor::HostZeros(DType::kF32, weights.moe.router.dense.shape()).value();
  Statistics statistics;
  ASSERT_TRUE(
      rig.calibration
          ->Collect(weights, nullptr, {Hessian(6), AbsMean(6), AbsMax(7), Rows(7, 3)}, &statistics)
          .ok());
  EXPECT_EQ(statistics.RowCount(6), 0);
  EXPECT_EQ(statistics.RowCount(2), kWindows * kLength);
  for (const StatRequest& request : {Hessian(6), AbsMean(6), AbsMax(7)}) {
    const Tensor* value = statistics.Find(request);
    ASSERT_NE(value, nullptr);
    for (int64_t i = 0; i < value->elements(); ++i) ASSERT_EQ(value->as<float>()[i], 0.0f);
  }
  ASSERT_NE(statistics.Find(Rows(7, 3)), nullptr);
  EXPECT_EQ(statistics.Find(Rows(7, 3))->shape(), Shape({0, 48}));
}

// Cross compares rows of one expert: the untouched block runs with the quantized stream's routing.
TEST(CalibrationTest, CrossOfExpertsUsesTheQuantizedRouting) {
  CalibrationRig rig(ExpertConfig(), TwoStreams());
  const BlockWeights untouched = rig.Block(0);
  ASSERT_TRUE(rig.calibration->Advance(rig.Disturbed(0), &untouched).ok());
  std::vector<StatRequest> requests;
  for (int group = 2; group < 14; ++group) {
    requests.push_back(Cross(group));
    requests.push_back(FromOriginal(AbsMax(group)));
  }
  const BlockWeights block = rig.Block(1);
  Statistics statistics;
  ASSERT_TRUE(rig.calibration->Collect(block, nullptr, requests, &statistics).ok());
  // By hand, window by window: the normed input of the experts in both streams.
  const auto original = SlowInputs(rig.config_json, *rig.source, rig.windows);
  const auto quantized = SlowInputs(rig.config_json, *rig.DisturbedModel(0), rig.windows);
  const std::string moe = "model.layers.1.block_sparse_moe.";
  const Matrix &x = quantized.at(moe + "gate"), &y = original.at(moe + "gate");
  for (int expert = 0; expert < 6; ++expert) {
    const std::string name = moe + "experts." + std::to_string(expert) + ".w1";
    if (!quantized.contains(name)) continue;
    // The rows of the quantized stream that this expert got, looked up in all rows.
    Matrix rows, differences;
    for (const auto& row : quantized.at(name)) {
      const auto found = std::find(x.begin(), x.end(), row);
      ASSERT_NE(found, x.end());
      rows.push_back(row);
      Matrix pair = Subtract({y[static_cast<size_t>(found - x.begin())]}, {row});
      differences.push_back(pair[0]);
    }
    const Tensor* value = statistics.Find(Cross(2 + 2 * expert));
    ASSERT_NE(value, nullptr);
    ExpectNear(*value, Gram(differences, rows), StatTolerance(Gram(rows, rows)));
    // Statistics of the untouched model alone use its own routing.
    const int64_t own =
        original.contains(name) ? static_cast<int64_t>(original.at(name).size()) : 0;
    EXPECT_EQ(statistics.RowCount(2 + 2 * expert, true), own);
    EXPECT_EQ(statistics.RowCount(2 + 2 * expert), static_cast<int64_t>(rows.size()));
  }
}

// ---- bad input ----------------------------------------------------------------------------------

TEST(CalibrationTest, RequestsThatCannotBeServed) {
  CalibrationRig rig(SmallConfig("llama"));
  Statistics statistics;
  const auto collect = [&](const StatRequest& request) {
    return rig.calibration->Collect(rig.Block(0), nullptr, {request}, &statistics);
  };
  EXPECT_TRUE(absl::IsInvalidArgument(collect(Hessian(4))));
  EXPECT_TRUE(absl::IsInvalidArgument(collect(Hessian(-1))));
  EXPECT_TRUE(absl::IsInvalidArgument(collect(Rows(0, 0))));
  EXPECT_TRUE(absl::IsInvalidArgument(collect({0, StatKind::kHessian, 3, false})));
  EXPECT_TRUE(absl::IsInvalidArgument(collect({0, StatKind::kCross, 0, true})));
  const absl::Status status = collect(Cross(0));
  EXPECT_TRUE(absl::IsFailedPrecondition(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("keep the original stream"));
  EXPECT_TRUE(absl::IsFailedPrecondition(collect(FromOriginal(AbsMean(0)))));
  EXPECT_TRUE(absl::IsFailedPrecondition(rig.calibration->Input(0, true).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(rig.calibration->Input(kWindows, false).status()));
}

TEST(CalibrationTest, BeyondTheLastBlock) {
  CalibrationRig rig(SmallConfig("llama"));
  ASSERT_TRUE(rig.calibration->Advance(rig.Block(0), nullptr).ok());
  ASSERT_TRUE(rig.calibration->Advance(rig.Block(1), nullptr).ok());
  Statistics statistics;
  EXPECT_TRUE(absl::IsFailedPrecondition(rig.calibration->Advance(rig.Block(1), nullptr)));
  EXPECT_TRUE(absl::IsFailedPrecondition(
      rig.calibration->Collect(rig.Block(1), nullptr, {Hessian(0)}, &statistics)));
  EXPECT_TRUE(rig.calibration->Input(0, false).ok());
}

TEST(CalibrationTest, WindowsThatDoNotBelongToTheModel) {
  CalibrationRig rig(SmallConfig("llama"));
  const Tensor embedding = rig.source->Embedding().value();
  const auto create = [&](const Tensor& windows) {
    return Calibration::Create(*rig.backend, rig.source->config(), windows, embedding, {}).status();
  };
  const absl::Status status = create(Tensor::FromI32({1, 2}, {3, 64}));
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("token id 64"));
  EXPECT_TRUE(absl::IsInvalidArgument(create(Tensor::FromI32({1, 2}, {-1, 0}))));
  EXPECT_TRUE(absl::IsInvalidArgument(create(Tensor::FromI32({2}, {1, 0}))));
  EXPECT_TRUE(absl::IsInvalidArgument(create(Tensor::FromI32({0, 4}, {}))));
}

TEST(CalibrationTest, ProgressCanStopTheWork) {
  std::vector<double> seen;
  CalibrationOptions options;
  options.batch_rows = kLength;
  options.progress = [&](double fraction) {
    seen.push_back(fraction);
    return seen.size() == 7 ? absl::CancelledError("stop") : absl::OkStatus();
  };
  CalibrationRig rig(SmallConfig("llama"), options);
  Statistics statistics;
  ASSERT_TRUE(rig.calibration->Collect(rig.Block(0), nullptr, {Hessian(0)}, &statistics).ok());
  EXPECT_EQ(seen, (std::vector<double>{0.2, 0.4, 0.6, 0.8, 1.0}));
  EXPECT_TRUE(absl::IsCancelled(rig.calibration->Advance(rig.Block(0), nullptr)));
}

// ---- names and memory ---------------------------------------------------------------------------

TEST(StatisticsTest, IdsRoundTrip) {
  for (StatKind kind : {StatKind::kHessian, StatKind::kCross, StatKind::kAbsMean, StatKind::kAbsMax,
                        StatKind::kRows}) {
    EXPECT_EQ(StatKindFromId(StatId(kind)).value(), kind);
  }
  const absl::Status status = StatKindFromId("hesian").status();
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("hessian, cross, absmean, absmax, rows"));
}

TEST(CalibrationMemoryTest, CountsWhatIsAllocated) {
  const ModelConfig config = ParseModelConfig(SmallConfig("llama")).value();
  CalibrationOptions options;
  const std::vector<StatRequest> requests = {Hessian(0), Cross(3), AbsMax(1), Rows(2, 10)};
  const CalibrationMemory one =
      EstimateCalibrationMemory(config, kWindows, kLength, DType::kF32, options, 0, requests);
  EXPECT_EQ(one.hidden, kWindows * kLength * 32 * 4);
  EXPECT_EQ(one.statistics, (32 * 32 + 48 * 48 + 64 + 10 * 32) * 4);
  // All five windows in one batch; attention (q and its mixture, k, v) is larger than the MLP, and
  // one input of 48 waits for the untouched block's.
  EXPECT_EQ(one.activations, kWindows * kLength * 4 * (3 * 32 + 2 * 64 + 2 * 32 + 48));
  options.keep_original = true;
  options.batch_rows = 1;
  const CalibrationMemory two =
      EstimateCalibrationMemory(config, kWindows, kLength, DType::kBF16, options, 0, requests);
  EXPECT_EQ(two.hidden, one.hidden);
  EXPECT_EQ(two.activations, one.activations / 2 / kWindows);
}

}  // namespace
}  // namespace quantmill
