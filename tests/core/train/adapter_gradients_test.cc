// Adapters around linears: forward against plain matrix arithmetic, gradients against central
// differences of the slow f64 decoder.
#include <random>

#include "gmock/gmock.h"
#include "tests/core/cpu/support.h"
#include "tests/core/model/random_model.h"
#include "tests/core/model/slow_reference.h"
#include "tests/core/train/fixtures.h"

namespace quantmill::testing {
namespace {

using Kind = LinearAdapter::Kind;

constexpr int64_t kAdapterRows = 10;
constexpr double kAdapterStep = 1e-5;
constexpr double kAdapterTolerance = 1e-4;  // of the largest element of a gradient

// x M, M [in, in] near the identity or [in, out] near zero. Trains M.
class MatrixAdapter : public LinearAdapter {
 public:
  MatrixAdapter(Kind kind, int64_t in, int64_t out, uint32_t seed)
      : matrix(RandomTensor({in, kind == Kind::kInput ? in : out}, seed, DType::kF32, 0.1f)),
        gradient(Tensor::HostZeros(DType::kF32, matrix.shape()).value()),
        kind_(kind) {
    for (int64_t i = 0; kind == Kind::kInput && i < in; ++i) matrix.as<float>()[i * in + i] += 1;
  }

  Kind kind() const override { return kind_; }

  absl::Status Forward(const Tensor& x, Tensor* saved, Tensor* out) override {
    if (saved != nullptr) *saved = Clone(x);
    Product(x, matrix, false, false, false, out);
    return absl::OkStatus();
  }
  absl::Status Backward(const Tensor& x, const Tensor& saved, const Tensor& d_out,
                        Tensor* d_x) override {
    EXPECT_TRUE(SameBytes(x, saved));
    Product(saved, d_out, true, false, true, &gradient);
    if (d_x != nullptr) Product(d_out, matrix, false, true, true, d_x);
    return absl::OkStatus();
  }

  Tensor matrix, gradient;

 private:
  // out = (or +=) a b, each as it is or transposed.
  static void Product(const Tensor& a, const Tensor& b, bool turn_a, bool turn_b, bool add,
                      Tensor* out) {
    const int64_t inner = a.dim(turn_a ? 0 : 1);
    for (int64_t i = 0; i < out->dim(0); ++i) {
      for (int64_t j = 0; j < out->dim(1); ++j) {
        double sum = 0;
        for (int64_t k = 0; k < inner; ++k) {
          sum += static_cast<double>(
                     a.as<const float>()[turn_a ? k * a.dim(1) + i : i * a.dim(1) + k]) *
                 b.as<const float>()[turn_b ? j * b.dim(1) + k : k * b.dim(1) + j];
        }
        float& value = out->as<float>()[i * out->dim(1) + j];
        value = static_cast<float>(add ? value + sum : sum);
      }
    }
  }

  Kind kind_;
};

using Adapters = std::vector<std::shared_ptr<MatrixAdapter>>;

Matrix Times(const Matrix& a, const Matrix& b) {
  Matrix product(a.size(), std::vector<double>(b[0].size()));
  for (size_t i = 0; i < a.size(); ++i) {
    for (size_t k = 0; k < b.size(); ++k) {
      for (size_t j = 0; j < b[0].size(); ++j) product[i][j] += a[i][k] * b[k][j];
    }
  }
  return product;
}

Matrix Turned(const Matrix& a) {
  Matrix turned(a[0].size(), std::vector<double>(a.size()));
  for (size_t i = 0; i < a.size(); ++i) {
    for (size_t j = 0; j < a[0].size(); ++j) turned[j][i] = a[i][j];
  }
  return turned;
}

Matrix ToMatrix(const Tensor& tensor) {
  Matrix matrix(static_cast<size_t>(tensor.dim(0)));
  const Doubles all = Values(tensor);
  for (size_t i = 0; i < matrix.size(); ++i) {
    const auto row = all.begin() + static_cast<int64_t>(i) * tensor.dim(1);
    matrix[i].assign(row, row + tensor.dim(1));
  }
  return matrix;
}

// The weight [out, in] that stands for a weight with adapters, the innermost first.
Matrix Effective(const Matrix& weight, const Adapters& adapters,
                 const std::vector<Matrix>& matrices) {
  Matrix turned = Turned(weight);  // [in, out]
  for (size_t i = 0; i < adapters.size(); ++i) {
    if (adapters[i]->kind() == Kind::kInput) {
      turned = Times(matrices[i], turned);
      continue;
    }
    for (size_t r = 0; r < turned.size(); ++r) {
      for (size_t c = 0; c < turned[0].size(); ++c) turned[r][c] += matrices[i][r][c];
    }
  }
  return Turned(turned);
}

Adapters MakeAdapters(const std::vector<Kind>& kinds, const Tensor& weight, uint32_t seed) {
  Adapters adapters;
  for (Kind kind : kinds) {
    adapters.push_back(std::make_shared<MatrixAdapter>(kind, weight.dim(1), weight.dim(0), seed++));
  }
  return adapters;
}

std::vector<Matrix> MatricesOf(const Adapters& adapters) {
  std::vector<Matrix> matrices;
  for (const auto& adapter : adapters) matrices.push_back(ToMatrix(adapter->matrix));
  return matrices;
}

const std::vector<std::vector<Kind>> kChains = {{Kind::kInput},
                                                {Kind::kDelta},
                                                {Kind::kInput, Kind::kDelta},
                                                {Kind::kDelta, Kind::kInput},
                                                {Kind::kInput, Kind::kInput},
                                                {Kind::kDelta, Kind::kDelta}};

TEST(AdaptersTest, ApplyLinearIsPlainArithmetic) {
  const auto backend = MakeCpuBackend(2).value();
  for (const std::vector<Kind>& kinds : kChains) {
    LinearWeight linear;
    linear.dense = RandomTensor({12, 8}, 1);
    linear.bias = RandomTensor({12}, 2);
    const Tensor x = RandomTensor({5, 8}, 3);
    const Adapters adapters = MakeAdapters(kinds, linear.dense, 4);
    linear.adapters.assign(adapters.begin(), adapters.end());
    Tensor y = Garbage({5, 12});
    ASSERT_TRUE(ApplyLinear(*backend, linear, x, &y).ok());
    const Matrix expected = Times(
        ToMatrix(x), Turned(Effective(ToMatrix(linear.dense), adapters, MatricesOf(adapters))));
    for (int64_t i = 0; i < y.elements(); ++i) {
      const double bias = linear.bias.as<const float>()[i % 12];
      EXPECT_NEAR(y.as<const float>()[i],
                  expected[static_cast<size_t>(i / 12)][static_cast<size_t>(i % 12)] + bias, 2e-5);
    }
  }
}

// A block with chains of both kinds around its linears.
struct AdapterRig {
  AdapterRig() : json(SmallConfig("llama")) {
    json["num_hidden_layers"] = 1;
    source = MakeRandomModel(json, 31);
    backend = MakeCpuBackend(2).value();
    ops = MakeTrainingOps(*backend).value();
    rope = MakeRopeTables(source->config(), kAdapterRows, *backend).value();
    weights = source->LoadBlock(0, *backend).value();
    block = {&source->config(), 0, &weights, &rope, 1};
    input = Clone(source->Embedding().value().Rows(0, kAdapterRows));
    d_output = RandomTensor(input.shape(), 32);
    uint32_t seed = 40;
    size_t chain = 0;
    for (const LinearSlot& slot : BlockSlots(source->config(), 0)) {
      if (chain == kChains.size()) break;  // one is left as it is
      LinearWeight* linear = weights.At(slot);
      const Adapters made = MakeAdapters(kChains[chain++], linear->dense, seed += 2);
      linear->adapters.assign(made.begin(), made.end());
      adapters[slot.name + ".weight"] = made;
    }
  }

  // <d_output, block> of the slow decoder with one adapter's matrix replaced.
  double Slow(const std::string& name = "", size_t index = 0, const Matrix& matrix = {}) const {
    NamedMatrices tensors = source->Matrices();
    for (const auto& [weight, chain] : adapters) {
      std::vector<Matrix> matrices = MatricesOf(chain);
      if (weight == name) matrices[index] = matrix;
      tensors.at(weight) = Effective(tensors.at(weight), chain, matrices);
    }
    std::vector<int32_t> ids;
    for (int32_t id = 0; id < kAdapterRows; ++id) ids.push_back(id);
    const Matrix output = RunSlowReference(json, tensors, ids).hidden[1];
    double sum = 0;
    for (size_t i = 0; i < output.size(); ++i) {
      for (size_t j = 0; j < output[i].size(); ++j) {
        sum += output[i][j] * d_output.as<float>()[i * output[i].size() + j];
      }
    }
    return sum;
  }

  nlohmann::ordered_json json;
  std::unique_ptr<MemorySource> source;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<TrainingOps> ops;
  RopeTables rope;
  BlockWeights weights;
  TrainedBlock block;
  Tensor input, d_output;
  std::map<std::string, Adapters> adapters;  // by weight
};

TEST(AdaptersTest, GradientsAgreeWithCentralDifferences) {
  AdapterRig rig;
  BlockTape tape;
  const Tensor output = RunBlockOnTape(*rig.backend, rig.block, rig.input, &tape).value();
  Tensor hidden = Clone(rig.input);
  ASSERT_TRUE(
      RunBlock(*rig.backend, rig.source->config(), rig.weights, 0, rig.rope, BlockRun{}, &hidden)
          .ok());
  EXPECT_TRUE(SameBytes(output, hidden));
  BlockWeights places = PlaceGradients(rig.source->config(), 0, rig.weights, {}).value();
  const absl::Status status =
      BackwardThroughBlock(*rig.ops, rig.block, tape, rig.d_output, &places, nullptr);
  ASSERT_TRUE(status.ok()) << status;
  std::mt19937 random(33);
  for (const auto& [name, chain] : rig.adapters) {
    for (size_t index = 0; index < chain.size(); ++index) {
      const Doubles all = Values(chain[index]->gradient);
      double largest = 0;
      for (double value : all) largest = std::max(largest, std::abs(value));
      ASSERT_GT(largest, 1e-4) << name;
      Matrix matrix = ToMatrix(chain[index]->matrix);
      for (int sample = 0; sample < 6; ++sample) {
        const size_t at = random() % all.size();
        double& element = matrix[at / matrix[0].size()][at % matrix[0].size()];
        const double before = element;
        element = before + kAdapterStep;
        const double above = rig.Slow(name, index, matrix);
        element = before - kAdapterStep;
        const double below = rig.Slow(name, index, matrix);
        element = before;
        EXPECT_NEAR(all[at], (above - below) / (2 * kAdapterStep), kAdapterTolerance * largest)
            << name << " " << index << " at " << at;
      }
    }
  }
}

// Keeping activations and computing them again give the same bytes.
TEST(AdaptersTest, CheckpointingDoesNotMatter) {
  const GradientFixture fixture("llama");
  const auto backend = MakeCpuBackend(2).value();
  const auto ops = MakeTrainingOps(*backend).value();
  std::vector<Tensor> results[2];
  for (const bool checkpoint : {false, true}) {
    TrainingBatch batch = FixtureBatch(fixture);
    batch.checkpoint = checkpoint;
    TrainedModel model = LoadTrainedModel(*fixture.source, batch.ids.dim(1), *backend).value();
    std::vector<Adapters> all;
    for (BlockWeights& block : model.blocks) {
      for (LinearWeight* linear : {&block.q, &block.down}) {
        all.push_back(MakeAdapters({Kind::kInput, Kind::kDelta}, linear->dense, 50));
        linear->adapters.assign(all.back().begin(), all.back().end());
      }
    }
    const std::vector<NamedTensor> wanted = WantedGradients(fixture, *backend);
    ModelGradients places = PlaceModelGradients(model, wanted).value();
    const auto loss = AddModelGradients(*ops, model, batch, {0.5f, 0.5f}, 1, &places);
    ASSERT_TRUE(loss.ok()) << loss.status();
    for (const NamedTensor& gradient : wanted) results[checkpoint].push_back(gradient.tensor);
    for (const Adapters& chain : all) {
      for (const auto& adapter : chain) results[checkpoint].push_back(adapter->gradient);
    }
  }
  ASSERT_EQ(results[0].size(), results[1].size());
  for (size_t i = 0; i < results[0].size(); ++i) {
    EXPECT_TRUE(SameBytes(results[0][i], results[1][i])) << i;
  }
}

}  // namespace
}  // namespace quantmill::testing
