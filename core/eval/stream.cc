#include "core/eval/stream.h"

#include <algorithm>
#include <utility>

#include "core/base/status.h"

namespace quantmill {
namespace {

// 64 MiB of f32: a matrix product is efficient well below this, and memory stays small with large
// vocabularies (128 rows at 131072 tokens).
constexpr int64_t kTileElements = int64_t{1} << 24;

}  // namespace

absl::StatusOr<WindowStates> RunWindows(Backend& backend, WeightSource& model,
                                        const Tensor& windows, const StreamOptions& options,
                                        const StepProgress& progress) {
  const ModelConfig& config = model.config();
  QM_ASSIGN_OR_RETURN(const Tensor embedding, model.Embedding());
  QM_ASSIGN_OR_RETURN(WindowStates states,
                      WindowStates::Embed(backend, windows, embedding, options.batch_rows,
                                          options.hidden_on_device));
  QM_ASSIGN_OR_RETURN(const RopeTables rope, MakeRopeTables(config, states.length(), backend));
  for (int64_t block = 0; block < config.layers; ++block) {
    QM_ASSIGN_OR_RETURN(const BlockWeights weights, model.LoadBlock(block, backend));
    for (int64_t batch = 0; batch < states.batches(); ++batch) {
      QM_RETURN_IF_ERROR(states.Advance(backend, config, weights, block, rope, batch));
    }
    // On a GPU the block's copies may still be in use; its pages are not.
    QM_RETURN_IF_ERROR(backend.Synchronize());
    model.ReleaseBlock(block);
    if (progress) QM_RETURN_IF_ERROR(progress(block + 1, config.layers));
  }
  return states;
}

absl::StatusOr<OutputHead> OutputHead::Load(Backend& backend, WeightSource& model) {
  OutputHead head;
  head.config_ = &model.config();
  QM_ASSIGN_OR_RETURN(head.final_norm_, model.FinalNorm(backend));
  QM_ASSIGN_OR_RETURN(head.head_, model.Head(backend));
  return head;
}

absl::StatusOr<Tensor> OutputHead::Logits(Backend& backend, const Tensor& hidden) const {
  QM_ASSIGN_OR_RETURN(Tensor logits,
                      backend.Allocate(DType::kF32, {hidden.dim(0), config_->vocab_size}));
  QM_RETURN_IF_ERROR(RunHead(backend, *config_, final_norm_, head_, hidden, &logits));
  return logits;
}

int64_t OutputHead::TileRows() const { return TileRows(config_->vocab_size); }

int64_t OutputHead::TileRows(int64_t vocab) { return std::max<int64_t>(1, kTileElements / vocab); }

}  // namespace quantmill
