// Gradients of blocks against central differences of the slow f64 decoder.
#include "core/train/block_gradients.h"

#include <random>

#include "core/model/block_edits.h"
#include "tests/core/cpu/support.h"
#include "tests/core/model/random_model.h"
#include "tests/core/model/slow_reference.h"
#include "tests/core/train/slow_backward.h"

namespace quantmill::testing {
namespace {

using ::nlohmann::ordered_json;
using ::testing::HasSubstr;

constexpr int64_t kBlockRows = 10;
constexpr int64_t kHidden = 32;
constexpr double kBlockTolerance = 1e-4;  // of the largest element of a gradient
constexpr double kBlockStep = 1e-5;
constexpr char kTable[] = "model.embed_tokens.weight";

struct Case {
  const char* name;
  const char* type;
  ordered_json changes;
};

std::vector<Case> Cases() {
  return {{"llama", "llama", {}},
          {"llama_biases", "llama", {{"attention_bias", true}, {"mlp_bias", true}}},
          {"mistral_window", "mistral", {{"sliding_window", 4}}},
          {"qwen2_biases", "qwen2", {}},
          {"qwen3_norms", "qwen3", {{"attention_bias", false}}}};
}

// A model of one block: what it does is the block alone on the embedded rows.
struct BlockRig {
  explicit BlockRig(const Case& c, int threads = 2) : json(SmallConfig(c.type, c.changes)) {
    json["num_hidden_layers"] = 1;
    source = MakeRandomModel(json, 31);
    backend = MakeCpuBackend(threads).value();
    ops = MakeTrainingOps(*backend).value();
    rope = MakeRopeTables(source->config(), kBlockRows, *backend).value();
    weights = source->LoadBlock(0, *backend).value();
    block = {&source->config(), 0, &weights, &rope, 1};
    input = Clone(source->Embedding().value().Rows(0, kBlockRows));
    d_output = RandomTensor({kBlockRows, kHidden}, 32);
  }

  std::vector<NamedTensor> ZeroGradients() {
    std::vector<NamedTensor> all;
    const BlockTensors tensors(source->config(), 0, &weights);
    for (const auto& [name, tensor] : tensors.all()) {
      all.push_back({name, Tensor::HostZeros(DType::kF32, tensor->shape()).value()});
    }
    return all;
  }

  // Adds to `gradients`; the input's gradient is returned.
  Tensor Backward(const std::vector<NamedTensor>& gradients) {
    BlockWeights places = PlaceGradients(source->config(), 0, weights, gradients).value();
    BlockTape tape;
    EXPECT_TRUE(RunBlockOnTape(*backend, block, input, &tape).ok());
    Tensor d_input = Garbage(input.shape());
    const absl::Status status =
        BackwardThroughBlock(*ops, block, tape, d_output, &places, &d_input);
    EXPECT_TRUE(status.ok()) << status;
    return d_input;
  }

  // <d_output, block> of the slow decoder.
  double Slow(const NamedMatrices& tensors) const {
    std::vector<int32_t> ids;
    for (int32_t id = 0; id < kBlockRows; ++id) ids.push_back(id);
    const Matrix output = RunSlowReference(json, tensors, ids).hidden[1];
    double sum = 0;
    for (size_t i = 0; i < output.size(); ++i) {
      for (size_t j = 0; j < output[i].size(); ++j) {
        sum += output[i][j] * d_output.as<float>()[i * kHidden + j];
      }
    }
    return sum;
  }

  ordered_json json;
  std::unique_ptr<MemorySource> source;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<TrainingOps> ops;
  RopeTables rope;
  BlockWeights weights;
  TrainedBlock block;
  Tensor input, d_output;
};

class BlockGradients : public ::testing::TestWithParam<Case> {};

// Some elements one by one, and one random direction through all of them.
void ExpectDifferences(const BlockRig& rig, const std::string& name, const Tensor& gradient) {
  NamedMatrices tensors = rig.source->Matrices();
  Matrix& matrix = tensors.at(name);
  const size_t columns = static_cast<size_t>(gradient.dim(gradient.rank() - 1));
  const float* values = gradient.as<const float>();
  const Doubles all = Values(gradient);
  const double largest = std::abs(*std::max_element(
      all.begin(), all.end(), [](double a, double b) { return std::abs(a) < std::abs(b); }));
  ASSERT_GT(largest, 1e-4) << name;
  std::mt19937 random(33);
  for (int sample = 0; sample < 12; ++sample) {
    const size_t at = random() % all.size();
    double& element = matrix[at / columns][at % columns];
    const double before = element;
    element = before + kBlockStep;
    const double above = rig.Slow(tensors);
    element = before - kBlockStep;
    const double below = rig.Slow(tensors);
    element = before;
    EXPECT_NEAR(values[at], (above - below) / (2 * kBlockStep), kBlockTolerance * largest)
        << name << at;
  }
  const NamedMatrices original = tensors;
  std::normal_distribution<double> normal;
  double expected = 0, slopes[2], size = 0;
  for (int side = 0; side < 2; ++side) {
    std::mt19937 direction(34);
    expected = size = 0;
    for (size_t at = 0; at < all.size(); ++at) {
      const double d = normal(direction);
      matrix[at / columns][at % columns] = original.at(name)[at / columns][at % columns] +
                                           (side == 0 ? kBlockStep : -kBlockStep) * d;
      expected += d * values[at];
      size += std::abs(d * values[at]);
    }
    normal.reset();
    slopes[side] = rig.Slow(tensors);
  }
  EXPECT_NEAR((slopes[0] - slopes[1]) / (2 * kBlockStep), expected, 1e-5 * size) << name;
}

TEST_P(BlockGradients, AgreeWithCentralDifferences) {
  BlockRig rig(GetParam());
  const std::vector<NamedTensor> gradients = rig.ZeroGradients();
  const Tensor d_input = rig.Backward(gradients);
  for (const NamedTensor& gradient : gradients) {
    ExpectDifferences(rig, gradient.name, gradient.tensor);
  }
  // Rows of the table beyond the input have no part in it.
  Tensor table = Tensor::HostZeros(DType::kF32, rig.source->Embedding().value().shape()).value();
  std::copy_n(d_input.as<const float>(), d_input.elements(), table.as<float>());
  ExpectDifferences(rig, kTable, table);
}

TEST_P(BlockGradients, RecordingRunsTheSameBlock) {
  BlockRig rig(GetParam());
  BlockTape tape;
  const Tensor output = RunBlockOnTape(*rig.backend, rig.block, rig.input, &tape).value();
  Tensor hidden = Clone(rig.input);
  ASSERT_TRUE(
      RunBlock(*rig.backend, rig.source->config(), rig.weights, 0, rig.rope, BlockRun{}, &hidden)
          .ok());
  EXPECT_TRUE(SameBytes(output, hidden));
  int64_t bytes = 0;
  for (const Tensor* tensor :
       {&tape.input, &tape.attention_in, &tape.q_raw, &tape.k_raw, &tape.q, &tape.k, &tape.v,
        &tape.mixed, &tape.middle, &tape.mlp_in, &tape.gate, &tape.up, &tape.gated}) {
    if (!tensor->empty()) bytes += tensor->bytes();
  }
  EXPECT_EQ(bytes, TapeBytes(rig.source->config(), kBlockRows, DType::kF32));
}

TEST_P(BlockGradients, DoNotDependOnThreadsAndAdd) {
  BlockRig one(GetParam(), 1), three(GetParam(), 3);
  const std::vector<NamedTensor> a = one.ZeroGradients(), b = three.ZeroGradients();
  EXPECT_TRUE(SameBytes(one.Backward(a), three.Backward(b)));
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_TRUE(SameBytes(a[i].tensor, b[i].tensor)) << a[i].name;
  }
  three.Backward(b);
  for (size_t i = 0; i < a.size(); ++i) {
    Doubles twice = Values(a[i].tensor);
    for (double& value : twice) value *= 2;
    EXPECT_LT(RelativeError(Values(b[i].tensor), twice), 1e-5) << a[i].name;
  }
}

// What is asked for alone is what it is among all.
TEST_P(BlockGradients, AreTheSameAskedForAlone) {
  BlockRig rig(GetParam());
  const std::vector<NamedTensor> all = rig.ZeroGradients(), alone = rig.ZeroGradients();
  rig.Backward(all);
  for (size_t i = 0; i < alone.size(); ++i) {
    BlockWeights places =
        PlaceGradients(rig.source->config(), 0, rig.weights, {&alone[i], 1}).value();
    BlockTape tape;
    ASSERT_TRUE(RunBlockOnTape(*rig.backend, rig.block, rig.input, &tape).ok());
    ASSERT_TRUE(
        BackwardThroughBlock(*rig.ops, rig.block, tape, rig.d_output, &places, nullptr).ok());
    EXPECT_TRUE(SameBytes(all[i].tensor, alone[i].tensor)) << all[i].name;
  }
}

INSTANTIATE_TEST_SUITE_P(Architectures, BlockGradients, ::testing::ValuesIn(Cases()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(BlockGradientsErrors, NameWhatIsWrong) {
  BlockRig rig(Cases()[0]);
  const ModelConfig& config = rig.source->config();
  const std::string norm = "model.layers.0.input_layernorm.weight";
  const Tensor right = Tensor::HostZeros(DType::kF32, {kHidden}).value();
  const Tensor wrong = Tensor::HostZeros(DType::kF32, {kHidden + 1}).value();
  const auto place = [&](std::vector<NamedTensor> wanted) {
    return PlaceGradients(config, 0, rig.weights, wanted).status();
  };
  EXPECT_TRUE(place({{norm, right}}).ok());
  EXPECT_EQ(place({{"model.norm.weight", right}}).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(place({{norm, wrong}}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(place({{norm, right}, {norm, right}}).code(), absl::StatusCode::kInvalidArgument);
  BlockTape tape;
  EXPECT_FALSE(RunBlockOnTape(*rig.backend, rig.block, wrong, &tape).ok());
  const Tensor many = Tensor::HostZeros(DType::kF32, {kBlockRows + 1, kHidden}).value();
  EXPECT_EQ(RunBlockOnTape(*rig.backend, rig.block, many, &tape).status().code(),
            absl::StatusCode::kOutOfRange);
  ASSERT_TRUE(RunBlockOnTape(*rig.backend, rig.block, rig.input, &tape).ok());
  BlockWeights places = PlaceGradients(config, 0, rig.weights, {}).value();
  EXPECT_EQ(BackwardThroughBlock(*rig.ops, rig.block, tape, many, &places, nullptr).code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(BlockGradientsErrors, MixtureOfExpertsIsRefused) {
  const auto source = MakeRandomModel(
      SmallConfig("mixtral", {{"num_local_experts", 4}, {"num_experts_per_tok", 2}}), 35);
  const auto backend = MakeCpuBackend(1).value();
  const RopeTables rope = MakeRopeTables(source->config(), kBlockRows, *backend).value();
  const BlockWeights weights = source->LoadBlock(0, *backend).value();
  BlockTape tape;
  const absl::Status status =
      RunBlockOnTape(*backend, {&source->config(), 0, &weights, &rope, 1},
                     Tensor::HostZeros(DType::kF32, {kBlockRows, kHidden}).value(), &tape)
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(status.message()), HasSubstr("mixture of experts"));
}

}  // namespace
}  // namespace quantmill::testing
