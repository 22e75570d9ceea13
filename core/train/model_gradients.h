// Gradients of a whole decoder under a language-model loss, a distillation loss, or both. Logits
// exist for a few rows at a time only.
#ifndef QUANTMILL_CORE_TRAIN_MODEL_GRADIENTS_H_
#define QUANTMILL_CORE_TRAIN_MODEL_GRADIENTS_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "core/model/decoder.h"
#include "core/model/weights.h"
#include "core/train/training_ops.h"

namespace quantmill {

// A dense decoder whose weights are on the device. What `config` names must outlive it.
struct TrainedModel {
  const ModelConfig* config = nullptr;
  Tensor embedding;  // [vocab, hidden]; with a tied head the tensor of `head`
  std::vector<BlockWeights> blocks;
  Tensor final_norm;
  LinearWeight head;
  RopeTables rope;  // of at least as many positions as a sequence has
};

// The model of a source, on the device; UNIMPLEMENTED for a mixture of experts.
absl::StatusOr<TrainedModel> LoadTrainedModel(WeightSource& source, int64_t positions,
                                              Backend& backend);

// F32 tensors on the device where a gradient is wanted, empty elsewhere. With a tied head
// `embedding` takes the gradients of both uses.
struct ModelGradients {
  Tensor embedding, final_norm;
  std::vector<BlockWeights> blocks;
  LinearWeight head;
};

// wanted: by the tensor's full name in the checkpoint. Errors as PlaceGradients.
absl::StatusOr<ModelGradients> PlaceModelGradients(const TrainedModel& model,
                                                   absl::Span<const NamedTensor> wanted);

struct TrainingBatch {
  Tensor ids;      // I32 [sequences, length] on the host, in [0, vocab)
  Tensor targets;  // I32 [sequences, length] on the host: the next id; negative: not counted
  // For the distillation loss: the teacher's logits of rows [begin, end) of the batch (any model
  // float, on the device). May be null when there is none.
  std::function<absl::StatusOr<Tensor>(int64_t begin, int64_t end)> teacher;
  // Keep the inputs of blocks alone and run every block again on the way back; else keep the tapes
  // of all blocks, which is faster and takes their memory (TapeBytes).
  bool checkpoint = true;
};

// Means over the counted positions.
struct BatchLoss {
  double lm = 0, kl = 0;
  int64_t counted = 0;
};

// Adds `scale` times the gradients of the batch's mean loss, weights.lm lm + weights.kl kl, to
// `gradients`. INVALID_ARGUMENT for ids or targets out of range, FAILED_PRECONDITION when no
// position is counted.
absl::StatusOr<BatchLoss> AddModelGradients(TrainingOps& ops, const TrainedModel& model,
                                            const TrainingBatch& batch, const TokenLoss& weights,
                                            float scale, ModelGradients* gradients);

}  // namespace quantmill

#endif  // QUANTMILL_CORE_TRAIN_MODEL_GRADIENTS_H_
