// Whole models on the GPU against logits of another implementation (reference.safetensors, f32).
#include <string>
#include <tuple>

#include "core/base/status.h"
#include "core/io/safetensors_reader.h"
#include "core/model/decoder.h"
#include "core/model/dense_source.h"
#include "tests/core/cuda/support.h"
#include "tests/support/shared_data.h"

namespace quantmill::testing {
namespace {

constexpr const char* kModels[] = {"models/small-llama", "models/tiny-llama",
                                   "models/arch/llama3-rope", "models/arch/qwen2",
                                   "models/arch/mixtral"};

class CudaModelTest : public ::testing::TestWithParam<std::tuple<std::string, DType>> {
 protected:
  void SetUp() override {
    const absl::StatusOr<Backend*> made = CudaOrWhyNot(dtype());
    if (!made.ok()) GTEST_SKIP() << made.status().message();
    cuda_ = *made;
  }
  DType dtype() const { return std::get<1>(GetParam()); }

  // Logits of `ids` on the GPU, in runs of `step` positions over a cache; step 0 = all at once,
  // without one.
  absl::StatusOr<Tensor> Logits(WeightSource& source, const Tensor& ids, int64_t step) {
    const ModelConfig& config = source.config();
    const int64_t length = ids.dim(0);
    QM_ASSIGN_OR_RETURN(const RopeTables rope, MakeRopeTables(config, length, *cuda_));
    QM_ASSIGN_OR_RETURN(const Tensor table, source.Embedding());
    QM_ASSIGN_OR_RETURN(Tensor hidden, cuda_->Allocate(dtype(), {length, config.hidden_size}));
    QM_RETURN_IF_ERROR(cuda_->Embed(table, ids, &hidden));
    for (int64_t block = 0; block < config.layers; ++block) {
      QM_ASSIGN_OR_RETURN(const BlockWeights weights, source.LoadBlock(block, *cuda_));
      QM_RETURN_IF_ERROR(RunSteps(config, weights, block, rope, step, &hidden));
    }
    QM_ASSIGN_OR_RETURN(const Tensor norm, source.FinalNorm(*cuda_));
    QM_ASSIGN_OR_RETURN(const LinearWeight head, source.Head(*cuda_));
    QM_ASSIGN_OR_RETURN(Tensor logits, cuda_->Allocate(DType::kF32, {length, config.vocab_size}));
    QM_RETURN_IF_ERROR(RunHead(*cuda_, config, norm, head, hidden, &logits));
    Tensor host = Garbage(logits.shape());
    QM_RETURN_IF_ERROR(cuda_->Copy(logits, &host));
    return host;
  }

  absl::Status RunSteps(const ModelConfig& config, const BlockWeights& weights, int64_t block,
                        const RopeTables& rope, int64_t step, Tensor* hidden) {
    if (step == 0) return RunBlock(*cuda_, config, weights, block, rope, BlockRun{}, hidden);
    const int64_t length = hidden->dim(0);
    KvCache cache;
    QM_ASSIGN_OR_RETURN(cache.keys, cuda_->Allocate(dtype(), {length, config.kv_features()}));
    QM_ASSIGN_OR_RETURN(cache.values, cuda_->Allocate(dtype(), {length, config.kv_features()}));
    for (int64_t first = 0; first < length; first += step) {
      BlockRun run;
      run.first_position = first;
      run.cache = &cache;
      Tensor part = hidden->Rows(first, std::min(first + step, length));
      Tensor moved = part;
      QM_RETURN_IF_ERROR(RunBlock(*cuda_, config, weights, block, rope, run, &moved));
      if (moved.data() != part.data()) QM_RETURN_IF_ERROR(cuda_->Copy(moved, &part));
    }
    return absl::OkStatus();
  }

  // f32 keeps to the project's bound of 1e-3. Otherwise every block rounds the residual stream and
  // about a dozen intermediate results; independent errors add up as the square root of their
  // number, relative to logits of the size found, and a factor 8 covers the worst of 1e5 logits
  // together with the amplification by the norms.
  double Bound(const ModelConfig& config, const Tensor& expected) const {
    if (dtype() == DType::kF32) return 1e-3;
    double square = 0;
    for (double value : Values(expected)) square += value * value;
    const double rms = std::sqrt(square / static_cast<double>(expected.elements()));
    const double roundings = 14.0 * static_cast<double>(config.layers) + 2;
    return 8 * UnitRoundoff(dtype()) * std::sqrt(roundings) * rms;
  }

  Backend* cuda_ = nullptr;
};

INSTANTIATE_TEST_SUITE_P(
    Models, CudaModelTest,
    ::testing::Combine(::testing::ValuesIn(std::vector<std::string>(std::begin(kModels),
                                                                    std::end(kModels))),
                       ::testing::Values(DType::kF32, DType::kF16, DType::kBF16)),
    [](const auto& info) {
      std::string name = std::get<0>(info.param).substr(std::string("models/").size());
      std::replace_if(
          name.begin(), name.end(), [](char c) { return c == '-' || c == '/'; }, '_');
      return name + "_" + std::string(DTypeName(std::get<1>(info.param)));
    });

TEST_P(CudaModelTest, LogitsMatchTheReference) {
  const std::string model = std::get<0>(GetParam());
  QM_SHARED_OR_SKIP(directory, model);
  auto source = DenseSource::Open(directory);
  ASSERT_TRUE(source.ok()) << source.status().ToString();
  auto file = SafetensorsFile::Open(directory + "/reference.safetensors");
  ASSERT_TRUE(file.ok()) << file.status().ToString();
  const Tensor ids = (*file)->Get("input_ids").value();
  const Tensor flat = ids.Reshaped({ids.elements()});
  const Tensor expected = (*file)->Get("logits").value();
  const bool routed = (*source)->config().experts > 0;
  if (routed && dtype() != DType::kF32) {
    GTEST_SKIP() << "16-bit rounding may send a token to another expert";
  }
  // All at once; in pieces through the cache; the last kernels of generation, token by token.
  for (int64_t step : {0, 37, 1}) {
    SCOPED_TRACE(::testing::Message() << "step " << step);
    const auto logits = Logits(**source, flat, step);
    ASSERT_TRUE(logits.ok()) << logits.status().ToString();
    ExpectWithin(*logits, expected, Bound((*source)->config(), expected));
  }
}

}  // namespace
}  // namespace quantmill::testing
