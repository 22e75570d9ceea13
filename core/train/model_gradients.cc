#include "core/train/model_gradients.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"
#include "core/model/block_edits.h"
#include "core/model/block_parts.h"
#include "core/train/block_gradients.h"

namespace quantmill {
namespace {

// Logits at once, at most (at least one row): 64 MiB in f32.
constexpr int64_t kLogits = int64_t{1} << 24;
constexpr char kEmbeddingName[] = "model.embed_tokens.weight";
constexpr char kFinalNormName[] = "model.norm.weight";

absl::Status CheckIds(const Tensor& ids, const char* name, int64_t vocab, int64_t lowest) {
  if (ids.dtype() != DType::kI32 || ids.rank() != 2 || !ids.device().is_cpu()) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " of a batch are no I32 matrix on the host"));
  }
  for (int64_t i = 0; i < ids.elements(); ++i) {
    const int32_t id = ids.as<const int32_t>()[i];
    if (id >= lowest && id < vocab) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(name, " of a batch hold ", id, "; the vocabulary has ", vocab, " entries"));
  }
  return absl::OkStatus();
}

// One batch on its way through the model and back.
class Pass {
 public:
  Pass(TrainingOps& ops, const TrainedModel& model, const TrainingBatch& batch,
       const TokenLoss& weights, float scale, ModelGradients& gradients)
      : ops_(ops),
        backend_(ops.backend()),
        model_(model),
        batch_(batch),
        weights_(weights),
        scale_(scale),
        gradients_(gradients),
        sequences_(batch.ids.dim(0)),
        rows_(batch.ids.elements()) {}

  absl::StatusOr<BatchLoss> Run() {
    for (int64_t i = 0; i < rows_; ++i) loss_.counted += Targets()[i] >= 0 ? 1 : 0;
    if (loss_.counted == 0) {
      return absl::FailedPreconditionError(ErrorText("a batch without a position that counts",
                                                     "every target is masked",
                                                     "use longer sequences, or text with answers"));
    }
    QM_ASSIGN_OR_RETURN(const Tensor hidden, Forward());
    QM_ASSIGN_OR_RETURN(Tensor d_hidden, BackwardThroughHead(hidden));
    QM_RETURN_IF_ERROR(BackwardThroughBlocks(&d_hidden));
    if (!gradients_.embedding.empty()) {
      QM_ASSIGN_OR_RETURN(const Tensor ids, backend_.ToDevice(batch_.ids.Reshaped({rows_})));
      QM_RETURN_IF_ERROR(ops_.Embed(ids, d_hidden, &gradients_.embedding));
    }
    return ReadLoss();
  }

 private:
  const int32_t* Targets() const { return batch_.targets.as<const int32_t>(); }
  const ModelConfig& config() const { return *model_.config; }
  int64_t blocks() const { return static_cast<int64_t>(model_.blocks.size()); }

  absl::StatusOr<Tensor> CopyOf(const Tensor& tensor) {
    QM_ASSIGN_OR_RETURN(Tensor copy, backend_.Allocate(tensor.dtype(), tensor.shape()));
    QM_RETURN_IF_ERROR(backend_.Copy(tensor, &copy));
    return copy;
  }

  absl::StatusOr<Tensor> Forward() {
    QM_ASSIGN_OR_RETURN(Tensor hidden, backend_.Allocate(backend_.activation_dtype(),
                                                         {rows_, config().hidden_size}));
    QM_RETURN_IF_ERROR(backend_.Embed(model_.embedding, batch_.ids.Reshaped({rows_}), &hidden));
    BlockRun run;
    run.batch = sequences_;
    for (int64_t block = 0; block < blocks(); ++block) {
      if (!batch_.checkpoint) {
        QM_ASSIGN_OR_RETURN(
            hidden, RunBlockOnTape(backend_, BlockAt(block), hidden, &tapes_.emplace_back()));
        continue;
      }
      QM_ASSIGN_OR_RETURN(Tensor input, CopyOf(hidden));
      inputs_.push_back(std::move(input));
      QM_RETURN_IF_ERROR(RunBlock(backend_, config(), model_.blocks[static_cast<size_t>(block)],
                                  block, model_.rope, run, &hidden));
    }
    return hidden;
  }

  // Loss and its gradients, a few rows of logits at a time; the gradient of `hidden`.
  absl::StatusOr<Tensor> BackwardThroughHead(const Tensor& hidden) {
    QM_ASSIGN_OR_RETURN(const Tensor normed,
                        Normalized(backend_, config(), model_.final_norm, hidden));
    QM_ASSIGN_OR_RETURN(Tensor d_normed, backend_.Allocate(DType::kF32, hidden.shape()));
    QM_ASSIGN_OR_RETURN(const Tensor targets, backend_.ToDevice(batch_.targets.Reshaped({rows_})));
    QM_ASSIGN_OR_RETURN(losses_, backend_.Allocate(DType::kF32, {rows_, 2}));
    const int64_t step = std::max<int64_t>(1, kLogits / config().vocab_size);
    for (int64_t begin = 0; begin < rows_; begin += step) {
      const int64_t end = std::min(rows_, begin + step);
      Tensor d_rows = d_normed.Rows(begin, end);
      QM_RETURN_IF_ERROR(
          HeadRows(begin, normed.Rows(begin, end), targets.Rows(begin, end), &d_rows));
    }
    Tensor* d_norm = gradients_.final_norm.empty() ? nullptr : &gradients_.final_norm;
    QM_RETURN_IF_ERROR(ops_.RmsNorm(hidden, model_.final_norm,
                                    static_cast<float>(config().rms_norm_eps), d_normed, false,
                                    &d_normed, d_norm));
    return d_normed;
  }

  absl::Status HeadRows(int64_t begin, const Tensor& normed, const Tensor& targets,
                        Tensor* d_normed) {
    const int64_t rows = normed.dim(0);
    QM_ASSIGN_OR_RETURN(Tensor logits, backend_.Allocate(DType::kF32, {rows, config().vocab_size}));
    QM_RETURN_IF_ERROR(ApplyLinear(backend_, model_.head, normed, &logits));
    Tensor teacher;
    if (weights_.kl != 0 && batch_.teacher != nullptr) {
      QM_ASSIGN_OR_RETURN(teacher, batch_.teacher(begin, begin + rows));
    }
    Tensor losses = losses_.Rows(begin, begin + rows);
    const float scale = scale_ / static_cast<float>(loss_.counted);
    QM_RETURN_IF_ERROR(ops_.TokenLosses(targets, teacher, weights_, scale, &logits, &losses));
    QM_ASSIGN_OR_RETURN(const Tensor d_logits, ops_.AsFactor(logits));
    if (!gradients_.head.dense.empty()) {
      QM_RETURN_IF_ERROR(ops_.WeightGradient(d_logits, normed, &gradients_.head.dense));
    }
    return ops_.InputGradient(d_logits, model_.head.dense, false, d_normed);
  }

  // Waits for the device, once for the whole pass.
  absl::StatusOr<BatchLoss> ReadLoss() {
    QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(DType::kF32, losses_.shape()));
    QM_RETURN_IF_ERROR(backend_.Copy(losses_, &host));
    for (int64_t row = 0; row < rows_; ++row) {
      loss_.lm += host.as<float>()[2 * row];
      loss_.kl += host.as<float>()[2 * row + 1];
    }
    const double counted = static_cast<double>(loss_.counted);
    loss_.lm /= counted;
    loss_.kl /= counted;
    return loss_;
  }

  TrainedBlock BlockAt(int64_t index) const {
    return {model_.config, index, &model_.blocks[static_cast<size_t>(index)], &model_.rope,
            sequences_};
  }

  absl::StatusOr<BlockTape> TakeTape(int64_t index) {
    BlockTape tape;
    if (batch_.checkpoint) {
      QM_RETURN_IF_ERROR(RunBlockOnTape(backend_, BlockAt(index), inputs_.back(), &tape).status());
      inputs_.pop_back();
    } else {
      tape = std::move(tapes_.back());
      tapes_.pop_back();
    }
    return tape;
  }

  absl::Status BackwardThroughBlocks(Tensor* d_hidden) {
    for (int64_t index = blocks() - 1; index >= 0; --index) {
      QM_ASSIGN_OR_RETURN(const BlockTape tape, TakeTape(index));
      const bool wanted = index > 0 || !gradients_.embedding.empty();
      Tensor d_input;
      if (wanted) {
        QM_ASSIGN_OR_RETURN(d_input, backend_.Allocate(DType::kF32, d_hidden->shape()));
      }
      QM_RETURN_IF_ERROR(BackwardThroughBlock(ops_, BlockAt(index), tape, *d_hidden,
                                              &gradients_.blocks[static_cast<size_t>(index)],
                                              wanted ? &d_input : nullptr));
      *d_hidden = std::move(d_input);
    }
    return absl::OkStatus();
  }

  TrainingOps& ops_;
  Backend& backend_;
  const TrainedModel& model_;
  const TrainingBatch& batch_;
  const TokenLoss weights_;
  const float scale_;
  ModelGradients& gradients_;
  const int64_t sequences_, rows_;
  Tensor losses_;  // F32 [rows, 2] on the device
  // Of blocks that are still to be gone back through: one of the two.
  std::vector<Tensor> inputs_;
  std::vector<BlockTape> tapes_;
  BatchLoss loss_;
};

// The block of "model.layers.3.mlp.up_proj.weight"; -1 for a tensor outside of blocks.
int64_t BlockOf(const TrainedModel& model, const std::string& name) {
  for (int64_t block = 0; block < model.config->layers; ++block) {
    const std::string prefix = BlockName(block) + ".";
    if (name.compare(0, prefix.size(), prefix) == 0) return block;
  }
  return -1;
}

absl::Status Place(const NamedTensor& wanted, const Tensor& tensor, Tensor* place) {
  if (wanted.tensor.dtype() != DType::kF32 || !(wanted.tensor.shape() == tensor.shape()) ||
      !place->empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the gradient of ", wanted.name, " is ", wanted.tensor.shape().ToString(),
                     ", expected F32 ", tensor.shape().ToString(), ", once"));
  }
  *place = wanted.tensor;
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<TrainedModel> LoadTrainedModel(WeightSource& source, int64_t positions,
                                              Backend& backend) {
  TrainedModel model;
  model.config = &source.config();
  if (model.config->experts > 0) {
    return absl::UnimplementedError(ErrorText("this model cannot be trained",
                                              "mixtures of experts have no gradients yet",
                                              "use a model with dense MLPs"));
  }
  for (int64_t block = 0; block < model.config->layers; ++block) {
    QM_ASSIGN_OR_RETURN(BlockWeights weights, source.LoadBlock(block, backend));
    model.blocks.push_back(std::move(weights));
  }
  QM_ASSIGN_OR_RETURN(model.final_norm, source.FinalNorm(backend));
  QM_ASSIGN_OR_RETURN(model.head, source.Head(backend));
  if (model.config->tied_embeddings && !model.head.dense.empty()) {
    model.embedding = model.head.dense;
  } else {
    QM_ASSIGN_OR_RETURN(const Tensor table, source.Embedding());
    QM_ASSIGN_OR_RETURN(model.embedding, backend.ToDevice(table));
  }
  QM_ASSIGN_OR_RETURN(model.rope, MakeRopeTables(*model.config, positions, backend));
  return model;
}

absl::StatusOr<ModelGradients> PlaceModelGradients(const TrainedModel& model,
                                                   absl::Span<const NamedTensor> wanted) {
  ModelGradients gradients;
  std::map<int64_t, std::vector<NamedTensor>> by_block;
  const std::string head = HeadSlot(*model.config).name + ".weight";
  const bool tied = model.config->tied_embeddings;
  for (const NamedTensor& item : wanted) {
    if (const int64_t block = BlockOf(model, item.name); block >= 0) {
      by_block[block].push_back(item);
    } else if (item.name == kEmbeddingName) {
      QM_RETURN_IF_ERROR(Place(item, model.embedding, &gradients.embedding));
    } else if (item.name == kFinalNormName) {
      QM_RETURN_IF_ERROR(Place(item, model.final_norm, &gradients.final_norm));
    } else if (item.name == head && !tied && !model.head.dense.empty()) {
      QM_RETURN_IF_ERROR(Place(item, model.head.dense, &gradients.head.dense));
    } else {
      return absl::NotFoundError(absl::StrCat("no tensor '", item.name, "' in the model"));
    }
  }
  if (tied) gradients.head.dense = gradients.embedding;
  for (int64_t block = 0; block < model.config->layers; ++block) {
    QM_ASSIGN_OR_RETURN(BlockWeights places,
                        PlaceGradients(*model.config, block,
                                       model.blocks[static_cast<size_t>(block)], by_block[block]));
    gradients.blocks.push_back(std::move(places));
  }
  return gradients;
}

absl::StatusOr<BatchLoss> AddModelGradients(TrainingOps& ops, const TrainedModel& model,
                                            const TrainingBatch& batch, const TokenLoss& weights,
                                            float scale, ModelGradients* gradients) {
  const int64_t vocab = model.config->vocab_size;
  QM_RETURN_IF_ERROR(CheckIds(batch.ids, "ids", vocab, 0));
  QM_RETURN_IF_ERROR(CheckIds(batch.targets, "targets", vocab, INT32_MIN));
  if (!(batch.ids.shape() == batch.targets.shape())) {
    return absl::InvalidArgumentError(absl::StrCat("a batch has ids ", batch.ids.shape().ToString(),
                                                   " and targets ",
                                                   batch.targets.shape().ToString()));
  }
  return Pass(ops, model, batch, weights, scale, *gradients).Run();
}

}  // namespace quantmill
