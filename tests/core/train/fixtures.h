// Models with the gradients PyTorch computed for them: tests/data/gradients/make_fixtures.py.
#ifndef QUANTMILL_TESTS_CORE_TRAIN_FIXTURES_H_
#define QUANTMILL_TESTS_CORE_TRAIN_FIXTURES_H_

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "core/io/safetensors_reader.h"
#include "core/model/block_edits.h"
#include "core/model/dense_source.h"
#include "core/train/block_gradients.h"
#include "core/train/model_gradients.h"
#include "tests/core/cpu/support.h"
#include "tests/core/train/slow_backward.h"
#include "tests/support/shared_data.h"

namespace quantmill::testing {

// Those in the tree, and the folder that QM_GRADIENT_FIXTURE names: make_fixtures.py --model writes
// one for any model.
inline std::vector<std::string> GradientFixtureNames() {
  std::vector<std::string> names = {"llama", "llama-tied", "mistral", "qwen2", "qwen3"};
  if (const char* more = std::getenv("QM_GRADIENT_FIXTURE")) names.emplace_back(more);
  return names;
}

// Letters, digits and underscores only.
inline std::string TestNameOf(std::string fixture) {
  const auto plain = [](unsigned char c) { return std::isalnum(c) != 0; };
  std::replace_if(
      fixture.begin(), fixture.end(), [&](char c) { return !plain(c); }, '_');
  return fixture;
}
inline constexpr int64_t kFixtureSequences = 2;

struct GradientFixture {
  explicit GradientFixture(const std::string& name)
      : folder(name[0] == '/' ? name : SourcePath("tests/data/gradients/" + name)),
        source(DenseSource::Open(folder).value()),
        file(SafetensorsFile::Open(folder + "/gradients.safetensors").value()) {}
  const ModelConfig& config() const { return source->config(); }
  Tensor Get(const std::string& name) const { return file->Get(name).value(); }

  std::string folder;
  std::unique_ptr<DenseSource> source;
  std::shared_ptr<const SafetensorsFile> file;
};

struct NamedError {
  std::string name;
  double error;  // RelativeError of the gradient
};

// Gradients of one block on `backend`, from its input and its output's gradient, against those of
// the fixture.
inline std::vector<NamedError> BlockErrors(const GradientFixture& fixture, int64_t index,
                                           Backend& backend) {
  const ModelConfig& config = fixture.config();
  const auto device = [&](const Tensor& host, DType dtype) {
    Tensor tensor = backend.Allocate(dtype, host.shape()).value();
    EXPECT_TRUE(backend.Copy(host, &tensor).ok());
    return tensor;
  };
  const auto host = [&](const Tensor& tensor) {
    Tensor copy = Garbage(tensor.shape());
    EXPECT_TRUE(backend.Copy(tensor, &copy).ok());
    return Values(copy);
  };
  BlockWeights weights = fixture.source->LoadBlock(index, backend).value();
  const Tensor input = fixture.Get("hidden." + std::to_string(index));
  const Tensor d_output = fixture.Get("d_hidden." + std::to_string(index + 1));
  const RopeTables rope = MakeRopeTables(config, input.dim(0) / kFixtureSequences, backend).value();
  const TrainedBlock block = {&config, index, &weights, &rope, kFixtureSequences};
  std::vector<NamedTensor> wanted;
  const BlockTensors tensors(config, index, &weights);
  for (const auto& [name, tensor] : tensors.all()) {
    wanted.push_back({name, backend.Allocate(DType::kF32, tensor->shape()).value()});
    EXPECT_TRUE(backend.Zero(&wanted.back().tensor).ok());
  }
  BlockWeights places = PlaceGradients(config, index, weights, wanted).value();
  const auto ops = MakeTrainingOps(backend).value();
  BlockTape tape;
  const Tensor output =
      RunBlockOnTape(backend, block, device(input, backend.activation_dtype()), &tape).value();
  Tensor d_input = backend.Allocate(DType::kF32, input.shape()).value();
  const absl::Status status =
      BackwardThroughBlock(*ops, block, tape, device(d_output, DType::kF32), &places, &d_input);
  EXPECT_TRUE(status.ok()) << status;
  std::vector<NamedError> errors;
  const auto add = [&](const std::string& name, const Tensor& actual, const Tensor& expected) {
    errors.push_back({name, RelativeError(host(actual), Values(expected))});
  };
  add("output", output, fixture.Get("hidden." + std::to_string(index + 1)));
  add("input", d_input, fixture.Get("d_hidden." + std::to_string(index)));
  for (const NamedTensor& gradient : wanted) {
    add(gradient.name, gradient.tensor, fixture.Get("lm." + gradient.name));
  }
  return errors;
}

// Every tensor of the model with a zeroed gradient.
inline std::vector<NamedTensor> WantedGradients(const GradientFixture& fixture, Backend& backend) {
  std::vector<NamedTensor> wanted;
  for (const TensorSpec& spec : RequiredTensors(fixture.config())) {
    wanted.push_back({spec.name, backend.Allocate(DType::kF32, spec.shape).value()});
    EXPECT_TRUE(backend.Zero(&wanted.back().tensor).ok());
  }
  return wanted;
}

// The tensor of that name; null if there is none.
inline Tensor* FindTensor(TrainedModel& model, const std::string& name) {
  if (name == "model.embed_tokens.weight") return &model.embedding;
  if (name == "model.norm.weight") return &model.final_norm;
  if (name == "lm_head.weight") return &model.head.dense;
  for (size_t block = 0; block < model.blocks.size(); ++block) {
    const BlockTensors tensors(*model.config, static_cast<int64_t>(block), &model.blocks[block]);
    if (Tensor* tensor = tensors.Find(name); tensor != nullptr) return tensor;
  }
  return nullptr;
}

inline TrainingBatch FixtureBatch(const GradientFixture& fixture) {
  TrainingBatch batch;
  batch.ids = fixture.Get("input_ids");
  batch.targets = fixture.Get("labels");
  const Tensor teacher = fixture.Get("teacher_logits");
  batch.teacher = [teacher](int64_t begin, int64_t end) -> absl::StatusOr<Tensor> {
    return teacher.Rows(begin, end);
  };
  return batch;
}

// The gradients of all tensors under the loss "lm" or "kl", and the loss itself.
inline std::vector<NamedError> ModelErrors(const GradientFixture& fixture, const std::string& loss,
                                           Backend& backend) {
  TrainingBatch batch = FixtureBatch(fixture);
  const auto on_host = batch.teacher;
  batch.teacher = [&](int64_t begin, int64_t end) -> absl::StatusOr<Tensor> {
    return backend.ToDevice(on_host(begin, end).value());
  };
  const TrainedModel model = LoadTrainedModel(*fixture.source, batch.ids.dim(1), backend).value();
  const auto ops = MakeTrainingOps(backend).value();
  const std::vector<NamedTensor> wanted = WantedGradients(fixture, backend);
  ModelGradients places = PlaceModelGradients(model, wanted).value();
  const TokenLoss weights = loss == "lm" ? TokenLoss{1, 0} : TokenLoss{0, 1};
  const absl::StatusOr<BatchLoss> made = AddModelGradients(*ops, model, batch, weights, 1, &places);
  EXPECT_TRUE(made.ok()) << made.status();
  std::vector<NamedError> errors;
  const double expected = Values(fixture.Get(loss + "_loss"))[0];
  errors.push_back({"loss", std::abs((loss == "lm" ? made->lm : made->kl) - expected) / expected});
  for (const NamedTensor& item : wanted) {
    Tensor host = Garbage(item.tensor.shape());
    EXPECT_TRUE(backend.Copy(item.tensor, &host).ok());
    errors.push_back(
        {item.name, RelativeError(Values(host), Values(fixture.Get(loss + "." + item.name)))});
  }
  return errors;
}

}  // namespace quantmill::testing

#endif  // QUANTMILL_TESTS_CORE_TRAIN_FIXTURES_H_
