// Hidden states and logits of real checkpoints against stored f32 results of another engine.
#include <cmath>
#include <memory>
#include <string>

#include "core/io/safetensors_reader.h"
#include "core/model/decoder.h"
#include "core/model/dense_source.h"
#include "gtest/gtest.h"
#include "tests/support/shared_data.h"

namespace quantmill {
namespace {

constexpr double kTolerance = 1e-3;

void ExpectClose(const Tensor& actual, const Tensor& expected, const std::string& what) {
  ASSERT_EQ(actual.shape(), expected.shape()) << what;
  double worst = 0;
  for (int64_t i = 0; i < actual.elements(); ++i) {
    const double difference = std::abs(static_cast<double>(actual.as<float>()[i]) -
                                       static_cast<double>(expected.as<float>()[i]));
    if (!(difference <= worst)) worst = difference;
  }
  EXPECT_LE(worst, kTolerance) << what;
}

class SharedModel : public ::testing::TestWithParam<const char*> {};

TEST_P(SharedModel, AgreesWithStoredHiddenStatesAndLogits) {
  QM_SHARED_OR_SKIP(directory, std::string("models/") + GetParam());
  const auto backend = MakeCpuBackend().value();
  const auto source_or = DenseSource::Open(directory);
  ASSERT_TRUE(source_or.ok()) << source_or.status();
  DenseSource& source = **source_or;
  const ModelConfig& config = source.config();
  const auto reference = SafetensorsFile::Open(directory + "/reference.safetensors").value();
  const Tensor ids = reference->Get("input_ids").value();
  const int64_t length = ids.dim(1);
  const RopeTables rope = MakeRopeTables(config, length, *backend).value();

  Tensor hidden = Tensor::Host(DType::kF32, {length, config.hidden_size}).value();
  const Tensor embedding = source.Embedding().value();
  ASSERT_TRUE(backend->Embed(embedding, ids.Reshaped({length}), &hidden).ok());
  const auto compare_hidden = [&](int64_t index) {
    const std::string name = "hidden_" + std::to_string(index);
    // The last stored one comes after the final norm.
    if (index == config.layers || reference->Find(name) == nullptr) return;
    ExpectClose(hidden, reference->Get(name).value(), name);
  };
  compare_hidden(0);
  for (int64_t block = 0; block < config.layers; ++block) {
    const BlockWeights weights = source.LoadBlock(block, *backend).value();
    const absl::Status status =
        RunBlock(*backend, config, weights, block, rope, BlockRun{}, &hidden);
    ASSERT_TRUE(status.ok()) << status;
    source.ReleaseBlock(block);
    compare_hidden(block + 1);
  }
  Tensor logits = Tensor::Host(DType::kF32, {length, config.vocab_size}).value();
  const absl::Status status = RunHead(*backend, config, source.FinalNorm(*backend).value(),
                                      source.Head(*backend).value(), hidden, &logits);
  ASSERT_TRUE(status.ok()) << status;
  ExpectClose(logits, reference->Get("logits").value(), "logits");
}

INSTANTIATE_TEST_SUITE_P(All, SharedModel,
                         ::testing::Values("small-llama", "tiny-llama", "arch/llama3-rope",
                                           "arch/mixtral", "arch/qwen2"),
                         [](const auto& info) {
                           std::string name = info.param;
                           for (char& c : name) {
                             if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
                           }
                           return name;
                         });

}  // namespace
}  // namespace quantmill
