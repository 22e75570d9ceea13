// One training step on the GPU in bf16, distilled from a teacher of the same shape: the whole, and
// its parts one by one. Random weights of a small decoder (19 M parameters), batches of 32 x 1024
// tokens. Gradients of a short batch are compared with those of the CPU in f32 before anything is
// timed. Times are medians of runs that wait for the device before and after; parts that a step
// runs together are timed apart, so that their sum is a little more than the step.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/model/block_edits.h"
#include "core/model/block_parts.h"
#include "core/train/adamw.h"
#include "core/train/block_gradients.h"
#include "core/train/model_gradients.h"
#include "tests/bench/cuda_timing.h"

namespace quantmill::bench {
namespace {

constexpr int kRuns = 7;
constexpr int64_t kHeadRows = 2048;  // logits at once

ModelConfig SmallDecoder(int64_t layers) {
  ModelConfig config;
  config.hidden_size = 384;
  config.intermediate_size = 1024;
  config.layers = layers;
  config.heads = 6;
  config.kv_heads = 2;
  config.head_dim = 64;
  config.vocab_size = 8192;
  config.max_positions = 2048;
  config.rms_norm_eps = 1e-5;
  config.tied_embeddings = true;
  config.sliding_window.assign(static_cast<size_t>(layers), 0);
  config.moe_layer.assign(static_cast<size_t>(layers), false);
  return config;
}

absl::StatusOr<Tensor> Random(Backend& backend, Shape shape, float mean, float deviation,
                              uint32_t seed) {
  QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(DType::kF32, shape));
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(mean, deviation);
  for (int64_t i = 0; i < host.elements(); ++i) {
    host.as<float>()[i] = BF16ToF32(F32ToBF16(normal(generator)));  // equal on both devices
  }
  QM_ASSIGN_OR_RETURN(Tensor typed, backend.Allocate(backend.activation_dtype(), shape));
  QM_RETURN_IF_ERROR(backend.Copy(host, &typed));
  return typed;
}

// Weights on `backend`, the same for equal seeds.
absl::StatusOr<TrainedModel> RandomModel(const ModelConfig& config, int64_t positions,
                                         Backend& backend, uint32_t seed) {
  TrainedModel model;
  model.config = &config;
  const int64_t hidden = config.hidden_size, inner = config.intermediate_size;
  const auto linear = [&](int64_t out, int64_t in, LinearWeight* weight) -> absl::Status {
    const float deviation = 1 / std::sqrt(static_cast<float>(in));
    QM_ASSIGN_OR_RETURN(weight->dense, Random(backend, {out, in}, 0, deviation, seed++));
    return absl::OkStatus();
  };
  for (int64_t block = 0; block < config.layers; ++block) {
    BlockWeights w;
    QM_ASSIGN_OR_RETURN(w.input_norm, Random(backend, {hidden}, 1, 0.1f, seed++));
    QM_ASSIGN_OR_RETURN(w.post_attention_norm, Random(backend, {hidden}, 1, 0.1f, seed++));
    QM_RETURN_IF_ERROR(linear(config.q_features(), hidden, &w.q));
    QM_RETURN_IF_ERROR(linear(config.kv_features(), hidden, &w.k));
    QM_RETURN_IF_ERROR(linear(config.kv_features(), hidden, &w.v));
    QM_RETURN_IF_ERROR(linear(hidden, config.q_features(), &w.o));
    QM_RETURN_IF_ERROR(linear(inner, hidden, &w.gate));
    QM_RETURN_IF_ERROR(linear(inner, hidden, &w.up));
    QM_RETURN_IF_ERROR(linear(hidden, inner, &w.down));
    model.blocks.push_back(std::move(w));
  }
  QM_ASSIGN_OR_RETURN(model.final_norm, Random(backend, {hidden}, 1, 0.1f, seed++));
  QM_RETURN_IF_ERROR(linear(config.vocab_size, hidden, &model.head));
  model.embedding = model.head.dense;
  QM_ASSIGN_OR_RETURN(model.rope, MakeRopeTables(config, positions, backend));
  return model;
}

// Every weight by its name in a checkpoint.
std::vector<NamedTensor> Parameters(TrainedModel& model) {
  std::vector<NamedTensor> named = {{"model.embed_tokens.weight", model.embedding},
                                    {"model.norm.weight", model.final_norm}};
  for (int64_t block = 0; block < model.config->layers; ++block) {
    const BlockTensors tensors(*model.config, block, &model.blocks[static_cast<size_t>(block)]);
    for (const auto& [name, tensor] : tensors.all()) named.push_back({name, *tensor});
  }
  return named;
}

TrainingBatch RandomBatch(int64_t sequences, int64_t length, int64_t vocab) {
  std::mt19937 generator(5);
  std::uniform_int_distribution<int32_t> uniform(0, static_cast<int32_t>(vocab) - 1);
  std::vector<int32_t> ids(static_cast<size_t>(sequences * length)), targets(ids.size());
  for (int32_t& id : ids) id = uniform(generator);
  for (size_t i = 0; i < ids.size(); ++i) {
    targets[i] = (i + 1) % static_cast<size_t>(length) == 0 ? -1 : ids[i + 1];
  }
  TrainingBatch batch;
  batch.ids = Tensor::FromI32({sequences, length}, ids);
  batch.targets = Tensor::FromI32({sequences, length}, targets);
  return batch;
}

// The last block's output.
absl::StatusOr<Tensor> Hidden(Backend& backend, const TrainedModel& model, const Tensor& ids) {
  const ModelConfig& config = *model.config;
  QM_ASSIGN_OR_RETURN(Tensor hidden, backend.Allocate(backend.activation_dtype(),
                                                      {ids.elements(), config.hidden_size}));
  QM_RETURN_IF_ERROR(backend.Embed(model.embedding, ids.Reshaped({ids.elements()}), &hidden));
  BlockRun run;
  run.batch = ids.dim(0);
  for (int64_t block = 0; block < config.layers; ++block) {
    QM_RETURN_IF_ERROR(RunBlock(backend, config, model.blocks[static_cast<size_t>(block)], block,
                                model.rope, run, &hidden));
  }
  return hidden;
}

absl::StatusOr<Tensor> Logits(Backend& backend, const TrainedModel& model, const Tensor& hidden,
                              int64_t begin, int64_t end) {
  QM_ASSIGN_OR_RETURN(Tensor logits,
                      backend.Allocate(DType::kF32, {end - begin, model.config->vocab_size}));
  QM_RETURN_IF_ERROR(RunHead(backend, *model.config, model.final_norm, model.head,
                             hidden.Rows(begin, end), &logits));
  return logits;
}

struct CheckedGradients {
  std::vector<std::vector<float>> values;  // in the order of Parameters
};

absl::StatusOr<CheckedGradients> GradientsOn(Backend& backend, const ModelConfig& config) {
  TrainingBatch batch = RandomBatch(2, 100, config.vocab_size);
  QM_ASSIGN_OR_RETURN(TrainedModel model, RandomModel(config, 100, backend, 1));
  QM_ASSIGN_OR_RETURN(const TrainedModel teacher, RandomModel(config, 100, backend, 1000));
  QM_ASSIGN_OR_RETURN(const auto ops, MakeTrainingOps(backend));
  QM_ASSIGN_OR_RETURN(const Tensor hidden, Hidden(backend, teacher, batch.ids));
  batch.teacher = [&](int64_t begin, int64_t end) {
    return Logits(backend, teacher, hidden, begin, end);
  };
  AdamW optimizer(*ops, {});
  for (const NamedTensor& parameter : Parameters(model)) {
    QM_RETURN_IF_ERROR(optimizer.Add(parameter.name, parameter.tensor, 1, false));
  }
  QM_ASSIGN_OR_RETURN(ModelGradients places, PlaceModelGradients(model, optimizer.gradients()));
  QM_RETURN_IF_ERROR(AddModelGradients(*ops, model, batch, {0, 1}, 1, &places).status());
  CheckedGradients result;
  for (const NamedTensor& gradient : optimizer.gradients()) {
    QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(DType::kF32, gradient.tensor.shape()));
    QM_RETURN_IF_ERROR(backend.Copy(gradient.tensor, &host));
    result.values.emplace_back(host.as<float>(), host.as<float>() + host.elements());
  }
  return result;
}

// || gpu - cpu || / || cpu || of every gradient. About two dozen roundings of a block to bf16 add
// up at random.
absl::Status Check(Backend& cuda) {
  const ModelConfig config = SmallDecoder(2);
  QM_ASSIGN_OR_RETURN(const CheckedGradients actual, GradientsOn(cuda, config));
  const auto cpu = MakeCpuBackend(0);
  if (!cpu.ok()) return cpu.status();
  QM_ASSIGN_OR_RETURN(const CheckedGradients expected, GradientsOn(**cpu, config));
  for (size_t i = 0; i < expected.values.size(); ++i) {
    double difference = 0, norm = 0;
    for (size_t k = 0; k < expected.values[i].size(); ++k) {
      const double value = expected.values[i][k], error = actual.values[i][k] - value;
      difference += error * error;
      norm += value * value;
    }
    const double relative = std::sqrt(difference / norm);
    if (!(relative <= 24 * 0x1p-8)) {
      return absl::InternalError(
          absl::StrCat("gradient ", i, " differs from the CPU's by ", relative));
    }
  }
  return absl::OkStatus();
}

class Bench {
 public:
  static absl::StatusOr<std::unique_ptr<Bench>> Create(Backend& cuda) {
    std::unique_ptr<Bench> bench(new Bench(cuda));
    QM_RETURN_IF_ERROR(bench->Open());
    return bench;
  }

  absl::Status Step() {
    QM_ASSIGN_OR_RETURN(const Tensor hidden, Hidden(cuda_, teacher_, batch_.ids));
    batch_.teacher = [&](int64_t begin, int64_t end) {
      return Logits(cuda_, teacher_, hidden, begin, end);
    };
    QM_RETURN_IF_ERROR(AddModelGradients(*ops_, model_, batch_, {0, 1}, 1, &places_).status());
    return OptimizerStep();
  }
  absl::Status OptimizerStep() { return optimizer_->Step(1e-6).status(); }

  absl::Status Teacher() {
    QM_ASSIGN_OR_RETURN(const Tensor hidden, Hidden(cuda_, teacher_, batch_.ids));
    for (int64_t begin = 0; begin < rows(); begin += kHeadRows) {
      QM_RETURN_IF_ERROR(Logits(cuda_, teacher_, hidden, begin, begin + kHeadRows).status());
    }
    return absl::OkStatus();
  }
  absl::Status Forward() { return Hidden(cuda_, model_, batch_.ids).status(); }

  // The student's logits, their loss against logits that are there already, and its gradients.
  absl::Status Head() {
    QM_ASSIGN_OR_RETURN(const Tensor normed,
                        Normalized(cuda_, config_, model_.final_norm, hidden_));
    for (int64_t begin = 0; begin < rows(); begin += kHeadRows) {
      const Tensor part = normed.Rows(begin, begin + kHeadRows);
      QM_ASSIGN_OR_RETURN(Tensor logits,
                          cuda_.Allocate(DType::kF32, {kHeadRows, config_.vocab_size}));
      QM_RETURN_IF_ERROR(ApplyLinear(cuda_, model_.head, part, &logits));
      QM_ASSIGN_OR_RETURN(Tensor losses, cuda_.Allocate(DType::kF32, {kHeadRows, 2}));
      QM_RETURN_IF_ERROR(ops_->TokenLosses(targets_.Rows(begin, begin + kHeadRows), teacher_logits_,
                                           {0, 1}, 1e-5f, &logits, &losses));
      QM_ASSIGN_OR_RETURN(const Tensor factor, ops_->AsFactor(logits));
      QM_RETURN_IF_ERROR(ops_->WeightGradient(factor, part, &places_.head.dense));
      Tensor d_part = d_hidden_.Rows(begin, begin + kHeadRows);
      QM_RETURN_IF_ERROR(ops_->InputGradient(factor, model_.head.dense, false, &d_part));
    }
    return absl::OkStatus();
  }

  absl::Status Recompute() {
    for (int64_t block = 0; block < config_.layers; ++block) {
      BlockTape tape;
      QM_RETURN_IF_ERROR(RunBlockOnTape(cuda_, Block(block), hidden_, &tape).status());
    }
    return absl::OkStatus();
  }
  absl::Status Attention() {
    Tensor d_q = Like(tape_.q), d_k = Like(tape_.k), d_v = Like(tape_.v);
    const AttentionShape shape = BlockAttention(config_, 0, kSequences, kLength, 0);
    for (int64_t block = 0; block < config_.layers; ++block) {
      QM_RETURN_IF_ERROR(
          ops_->Attention(shape, tape_.q, tape_.k, tape_.v, d_hidden_, &d_q, &d_k, &d_v));
    }
    return absl::OkStatus();
  }
  absl::Status Backward() {
    Tensor d_input = Like(hidden_);
    for (int64_t block = 0; block < config_.layers; ++block) {
      QM_RETURN_IF_ERROR(BackwardThroughBlock(*ops_, Block(0), tape_, d_hidden_,
                                              &places_.blocks[static_cast<size_t>(block)],
                                              &d_input));
    }
    return absl::OkStatus();
  }
  absl::Status Embedding() { return ops_->Embed(ids_, d_hidden_, &places_.embedding); }

  absl::StatusOr<double> Seconds(absl::Status (Bench::*part)()) {
    std::vector<double> times;
    for (int run = 0; run <= kRuns; ++run) {  // the first is the warm-up
      QM_RETURN_IF_ERROR(cuda_.Synchronize());
      const auto begin = std::chrono::steady_clock::now();
      QM_RETURN_IF_ERROR((this->*part)());
      QM_RETURN_IF_ERROR(cuda_.Synchronize());
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
      if (run > 0) times.push_back(elapsed.count());
    }
    std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
    return times[kRuns / 2];
  }
  double tokens() const { return static_cast<double>(rows()); }

 private:
  static constexpr int64_t kSequences = 32, kLength = 1024;

  explicit Bench(Backend& cuda) : cuda_(cuda), config_(SmallDecoder(10)) {}

  absl::Status Open() {
    batch_ = RandomBatch(kSequences, kLength, config_.vocab_size);
    QM_ASSIGN_OR_RETURN(ops_, MakeTrainingOps(cuda_));
    QM_ASSIGN_OR_RETURN(model_, RandomModel(config_, kLength, cuda_, 1));
    QM_ASSIGN_OR_RETURN(teacher_, RandomModel(config_, kLength, cuda_, 1000));
    AdamWOptions options;
    options.average_steps = 50;  // as trainings keep means
    optimizer_ = std::make_unique<AdamW>(*ops_, options);
    for (const NamedTensor& parameter : Parameters(model_)) {
      QM_RETURN_IF_ERROR(optimizer_->Add(parameter.name, parameter.tensor, 1, false));
    }
    QM_ASSIGN_OR_RETURN(places_, PlaceModelGradients(model_, optimizer_->gradients()));
    QM_ASSIGN_OR_RETURN(targets_, cuda_.ToDevice(batch_.targets.Reshaped({rows()})));
    QM_ASSIGN_OR_RETURN(ids_, cuda_.ToDevice(batch_.ids.Reshaped({rows()})));
    QM_ASSIGN_OR_RETURN(hidden_, Hidden(cuda_, model_, batch_.ids));
    QM_ASSIGN_OR_RETURN(teacher_logits_, Logits(cuda_, teacher_, hidden_, 0, kHeadRows));
    QM_ASSIGN_OR_RETURN(const Tensor noise,
                        Random(cuda_, {rows(), config_.hidden_size}, 0, 1e-5f, 7));
    QM_ASSIGN_OR_RETURN(d_hidden_, cuda_.Allocate(DType::kF32, noise.shape()));
    QM_RETURN_IF_ERROR(cuda_.Copy(noise, &d_hidden_));
    return RunBlockOnTape(cuda_, Block(0), hidden_, &tape_).status();
  }

  int64_t rows() const { return kSequences * kLength; }
  TrainedBlock Block(int64_t block) const {
    return {&config_, block, &model_.blocks[static_cast<size_t>(block)], &model_.rope, kSequences};
  }
  Tensor Like(const Tensor& tensor) { return cuda_.Allocate(DType::kF32, tensor.shape()).value(); }

  Backend& cuda_;
  ModelConfig config_;
  std::unique_ptr<TrainingOps> ops_;
  std::unique_ptr<AdamW> optimizer_;
  TrainedModel model_, teacher_;
  ModelGradients places_;
  TrainingBatch batch_;
  Tensor ids_, targets_, hidden_, d_hidden_, teacher_logits_;
  BlockTape tape_;  // of block 0
};

struct Part {
  const char* name;
  absl::Status (Bench::*run)();
};
constexpr Part kParts[] = {
    {"step", &Bench::Step},
    {"teacher forward", &Bench::Teacher},
    {"forward", &Bench::Forward},
    {"head and loss", &Bench::Head},
    {"recomputed forward", &Bench::Recompute},
    {"backward of blocks", &Bench::Backward},
    {"backward of attention (of these)", &Bench::Attention},
    {"backward of embedding", &Bench::Embedding},
    {"optimizer", &Bench::OptimizerStep},
};

absl::Status RunParts(Backend& cuda, const Options& options, std::vector<Row>* rows) {
  QM_RETURN_IF_ERROR(Check(cuda));
  QM_ASSIGN_OR_RETURN(const auto bench, Bench::Create(cuda));
  std::printf("%-40s %12s %14s\n", "part", "us", "tokens/s");
  for (const Part& part : kParts) {
    if (std::string(part.name).find(options.filter) == std::string::npos) continue;
    QM_ASSIGN_OR_RETURN(const double seconds, bench->Seconds(part.run));
    std::printf("%-40s %12.1f %14.0f\n", part.name, seconds * 1e6, bench->tokens() / seconds);
    std::fflush(stdout);
    rows->push_back({part.name, seconds * 1e6});
  }
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  Options options;
  if (!ParseOptions(argc, argv, &options)) return 2;
  if (options.list) {
    for (const Part& part : kParts) std::printf("%s\n", part.name);
    return 0;
  }
  auto cuda = MakeCudaBackend(0, DType::kBF16, 0);
  if (!cuda.ok()) {
    std::printf("skipped: %s\n", std::string(cuda.status().message()).c_str());
    return 0;
  }
  std::vector<Row> rows;
  if (const absl::Status status = RunParts(**cuda, options, &rows); !status.ok()) {
    PrintFailure("training", status);
    return 1;
  }
  return WriteJson(options.json, rows) ? 0 : 1;
}

}  // namespace
}  // namespace quantmill::bench

int main(int argc, char** argv) { return quantmill::bench::Main(argc, argv); }
