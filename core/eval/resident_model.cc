#include "core/eval/resident_model.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "core/base/status.h"

namespace quantmill {
namespace {

// Prompts run in pieces, so that activations stay small however long the prompt is; those of a
// batch in larger ones, as each holds only some positions of every sequence.
constexpr int64_t kPieceRows = 512, kBatchPieceRows = 4096;

// Ids [begin, begin + count) of every sequence.
std::vector<int32_t> Columns(absl::Span<const int32_t> ids, int64_t batch, int64_t begin,
                             int64_t count) {
  const int64_t length = static_cast<int64_t>(ids.size()) / batch;
  std::vector<int32_t> columns;
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* sequence = ids.data() + b * length;
    columns.insert(columns.end(), sequence + begin, sequence + begin + count);
  }
  return columns;
}

}  // namespace

absl::StatusOr<ResidentModel> ResidentModel::Load(Backend& backend, WeightSource& source,
                                                  const StepProgress& progress) {
  ResidentModel model;
  model.backend_ = &backend;
  model.config_ = &source.config();
  QM_ASSIGN_OR_RETURN(model.embedding_, source.Embedding());
  QM_ASSIGN_OR_RETURN(model.head_, OutputHead::Load(backend, source));
  for (int64_t block = 0; block < model.config_->layers; ++block) {
    QM_ASSIGN_OR_RETURN(BlockWeights weights, source.LoadBlock(block, backend));
    model.blocks_.push_back(std::move(weights));
    if (progress) QM_RETURN_IF_ERROR(progress(block + 1, model.config_->layers));
  }
  return model;
}

absl::StatusOr<DecodeSession> DecodeSession::Create(const ResidentModel& model, int64_t capacity,
                                                    int64_t batch) {
  const ModelConfig& config = model.config();
  if (capacity < 1 || batch < 1 || (config.max_positions > 0 && capacity > config.max_positions)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a context of ", capacity, " tokens is not possible; the model was made for at most ",
        config.max_positions, "; ask for fewer tokens or shorten the prompt"));
  }
  Backend& backend = model.backend();
  DecodeSession session;
  session.model_ = &model;
  session.batch_ = batch;
  session.capacity_ = capacity;
  QM_ASSIGN_OR_RETURN(session.rope_, MakeRopeTables(config, capacity, backend));
  session.caches_.resize(static_cast<size_t>(config.layers));
  const Shape shape = {batch * capacity, config.kv_features()};
  for (KvCache& cache : session.caches_) {
    QM_ASSIGN_OR_RETURN(cache.keys, backend.Allocate(backend.activation_dtype(), shape));
    QM_ASSIGN_OR_RETURN(cache.values, backend.Allocate(backend.activation_dtype(), shape));
  }
  return session;
}

absl::StatusOr<Tensor> DecodeSession::RunBlocks(absl::Span<const int32_t> ids) {
  Backend& backend = model_->backend();
  const ModelConfig& config = model_->config();
  const int64_t rows = static_cast<int64_t>(ids.size());
  QM_ASSIGN_OR_RETURN(Tensor hidden,
                      backend.Allocate(backend.activation_dtype(), {rows, config.hidden_size}));
  QM_RETURN_IF_ERROR(backend.Embed(model_->embedding(), Tensor::FromI32({rows}, ids), &hidden));
  for (int64_t block = 0; block < config.layers; ++block) {
    BlockRun run;
    run.batch = batch_;
    run.first_position = length_;
    run.cache = &caches_[static_cast<size_t>(block)];
    QM_RETURN_IF_ERROR(RunBlock(backend, config, model_->block(block), block, rope_, run, &hidden));
  }
  length_ += rows / batch_;
  return hidden;
}

absl::StatusOr<Tensor> DecodeSession::LastRows(const Tensor& hidden) {
  const int64_t length = hidden.dim(0) / batch_;
  if (length == 1) return hidden;
  if (batch_ == 1) return hidden.Rows(length - 1, length);
  std::vector<int32_t> rows;
  for (int64_t b = 0; b < batch_; ++b) rows.push_back(static_cast<int32_t>((b + 1) * length - 1));
  Backend& backend = model_->backend();
  QM_ASSIGN_OR_RETURN(Tensor last, backend.Allocate(hidden.dtype(), {batch_, hidden.dim(1)}));
  QM_RETURN_IF_ERROR(backend.GatherRows(hidden, Tensor::FromI32({batch_}, rows), &last));
  return last;
}

absl::StatusOr<Tensor> DecodeSession::Append(absl::Span<const int32_t> ids) {
  QM_ASSIGN_OR_RETURN(const Tensor logits, AppendOnDevice(ids));
  if (logits.device().is_cpu()) return logits;
  QM_ASSIGN_OR_RETURN(Tensor host, Tensor::Host(DType::kF32, logits.shape()));
  QM_RETURN_IF_ERROR(model_->backend().Copy(logits, &host));
  return host;
}

absl::StatusOr<Tensor> DecodeSession::AppendOnDevice(absl::Span<const int32_t> ids) {
  const int64_t count = static_cast<int64_t>(ids.size());
  const int64_t vocab = model_->embedding().dim(0);
  if (count == 0 || count % batch_ != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(count, " tokens cannot be shared out among ", batch_, " sequences"));
  }
  for (int32_t id : ids) {
    if (id < 0 || id >= vocab) {
      return absl::InvalidArgumentError(absl::StrCat("token id ", id, " is not one of the model's ",
                                                     vocab, "; check the tokenizer"));
    }
  }
  if (length_ + count / batch_ > capacity_) {
    return absl::OutOfRangeError(
        absl::StrCat("the context of ", capacity_, " tokens is full; ask for fewer tokens"));
  }
  const int64_t length = count / batch_;
  const int64_t piece = std::max<int64_t>(1, (batch_ == 1 ? kPieceRows : kBatchPieceRows) / batch_);
  Tensor hidden;
  for (int64_t begin = 0; begin < length; begin += piece) {
    QM_ASSIGN_OR_RETURN(hidden,
                        RunBlocks(Columns(ids, batch_, begin, std::min(piece, length - begin))));
  }
  QM_ASSIGN_OR_RETURN(const Tensor last, LastRows(hidden));
  return model_->head().Logits(model_->backend(), last);
}

}  // namespace quantmill
